from __future__ import annotations

import numpy as np

from scheduling.tables import RANK, conformed


def test_rows_of_an_older_version_keep_what_they_have_and_miss_what_is_new() -> None:
    older = np.dtype([(name, RANK[name]) for name in RANK.names or () if name not in ("drafted_tokens", "busy_s")])
    rows = np.zeros(2, older)
    rows["rank"], rows["host"], rows["steps"] = [4, 5], b"node7", 9
    found = conformed(rows, RANK)
    assert found.dtype == RANK
    assert (found["rank"].tolist(), found["host"].tolist(), found["steps"].tolist()) == ([4, 5], [b"node7"] * 2, [9, 9])
    assert found["drafted_tokens"].tolist() == [-1, -1]
    assert np.isnan(found["busy_s"]).all()


def test_rows_of_this_version_are_left_as_they_are() -> None:
    rows = np.zeros(2, RANK)
    assert conformed(rows, RANK) is rows
