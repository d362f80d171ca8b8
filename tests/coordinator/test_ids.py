"""A set of ids that holds hashes only."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.ids import IdSet, hash_id


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 20), max_size=6), max_size=20))
def test_an_id_set_knows_what_it_has_seen(batches: list[list[int]]) -> None:
    ids, known = IdSet(), set[int]()
    for batch in batches:
        expected = []
        for item in batch:
            expected.append(item in known)
            known.add(item)
        assert ids.add(b"".join(hash_id(str(item)) for item in batch)).tolist() == expected
    assert len(ids) == len(known)


def test_a_hash_is_the_same_in_every_process() -> None:
    assert hash_id("request-0").hex() == "206052e8386c2aff"
