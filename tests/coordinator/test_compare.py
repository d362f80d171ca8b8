"""What differs between two runs: answers by custom_id, options, versions, machines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import compare
from coordinator.compare import Change, compare_answers, compare_runs
from scheduling.errors import RunDirError
from scheduling.recordline import encode_embeddings, encode_failure, encode_result
from scheduling.requests import Request

ANSWERS = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(["x", "y", None]), max_size=8)


def line(index: int, custom_id: str, text: str | None, reason: str = "stop") -> bytes:
    if text is None:
        return encode_failure(custom_id, index, 1, 1, 0, "no", "said no")
    asked = Request(custom_id=custom_id, kind="completion", prompt="x")
    return encode_result(asked, index, 1, 1, 0, [(text, reason, 1)], 1, 1, 0.1, 0.1, 0.1 + index, 1, "m")


def write(path: Path, answers: dict[str, str | None]) -> Path:
    path.write_bytes(b"".join(line(k, name, text) for k, (name, text) in enumerate(answers.items())))
    return path


@settings(max_examples=60)
@given(before=ANSWERS, after=ANSWERS, collide=st.booleans())
def test_answers_are_paired_by_their_ids(
    tmp_path_factory: pytest.TempPathFactory, before: Any, after: Any, collide: bool
) -> None:
    folder = tmp_path_factory.mktemp("c")
    with pytest.MonkeyPatch.context() as patch:
        if collide:  # hashes that are equal are told apart by the ids themselves
            patch.setattr(compare, "hash_id", lambda name: bytes(7) + bytes([ord(name) % 2]))
        found = compare_answers(write(folder / "1", before), write(folder / "2", after))
    both = before.keys() & after.keys()
    assert found.equal == sum(before[name] == after[name] for name in both)
    assert found.different == len(both) - found.equal
    assert found.missing == len(before.keys() - after.keys())
    assert found.added == len(after.keys() - before.keys())
    assert found.missing_shown == [name for name in before if name not in after][: compare.ANSWERS_SHOWN]
    assert found.added_shown == [name for name in after if name not in before][: compare.ANSWERS_SHOWN]


def test_what_differs_is_shown_from_just_before_it(tmp_path: Path) -> None:
    same = "a long beginning that both have in common, "
    before = write(tmp_path / "1", {"a": same + "then this", "b": "", "c": None})
    after = write(tmp_path / "2", {"a": same + "then that", "b": "x", "c": "ok"})
    assert compare_answers(before, after).shown == [
        Change("a", "…e in common, then this [stop]", "…e in common, then that [stop]"),
        Change("b", " [stop]", "x [stop]"),
        Change("c", "failed: no", "ok [stop]"),
    ]


def test_the_way_an_answer_ended_counts_and_times_do_not(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(line(0, "a", "x") + line(1, "b", "x"))
    (tmp_path / "2").write_bytes(line(1, "b", "x", "length") + line(0, "a", "x"))
    found = compare_answers(tmp_path / "1", tmp_path / "2")
    assert (found.equal, found.different) == (1, 1)


def test_embeddings_are_compared_by_their_numbers(tmp_path: Path) -> None:
    asked = Request(custom_id="a", kind="embedding")
    for name, value in (("1", 0.5), ("2", 0.5), ("3", 0.25)):
        vectors = np.array([[value, 1.0]], np.float32)
        (tmp_path / name).write_bytes(encode_embeddings(asked, 0, 1, 1, 0, vectors, 1, 0.1, 0.1, "m"))
    assert compare_answers(tmp_path / "1", tmp_path / "2").equal == 1
    assert compare_answers(tmp_path / "1", tmp_path / "3").different == 1


def test_a_record_that_is_not_there_is_empty_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "1", {"a": "x", "b": "y"})
    assert compare_answers(tmp_path / "none", one).added == 2
    assert compare_answers(one, tmp_path / "none").missing == 2
    bad = tmp_path / "2"
    bad.write_bytes(one.read_bytes().replace(b'"a"', b'"z"'))
    with pytest.raises(RunDirError, match="damaged"):
        compare_answers(one, bad)


# ---------------------------------------------------------------- whole runs


def run_dir(path: Path, **changes: Any) -> Path:
    details = {
        "config": {"max_tokens": 8, "sampling": {}, "model": "m.gguf"}, "model": "/m.gguf",
        "versions": {"llmpi": changes.get("version", "1"), "python": "3.12"},
    }  # fmt: skip
    details["config"] |= changes.get("config", {})
    worker = {"rank": 0, "host": changes.get("host", "a"), "device": "CPU", "gpus": []}
    worker["fit"] = {"slots": 4, "said": f"memory {changes.get('free', 3)} GB free"}
    workers = [worker | {"rank": rank} for rank in changes.get("ranks", [0])]
    state = {
        "format": "llmpi-run", "version": 1, "complete": True, "total": 1, "details": details,
        "identity": {"model": "f", "adapters": [], "input": {"bytes": 3, "format": "jsonl", "ends_sha256": "s"}},
        "sessions": [
            {"session": 0, "ranks": len(workers), "launcher": "none", "mpi": None, "workers": workers}, {"session": 1}
        ],
    }  # fmt: skip
    path.mkdir()
    (path / "run.json").write_text(json.dumps(state))
    write(path / "results.jsonl", changes.get("answers", {"a": "x"}))
    return path


def test_two_runs_alike_differ_in_nothing(tmp_path: Path) -> None:
    found = compare_runs(run_dir(tmp_path / "1"), run_dir(tmp_path / "2", free=4))
    assert (found.configuration, found.versions, found.machines) == ([], [], [])
    said = io.StringIO()
    found.print(said)
    assert "configuration: the same" in said.getvalue()
    assert "1 equal, 0 different, 0 missing" in said.getvalue()


def test_what_differs_is_named_with_both_values(tmp_path: Path) -> None:
    one = run_dir(tmp_path / "1")
    two = run_dir(
        tmp_path / "2", version="2", host="b", config={"max_tokens": 4, "sampling": {"top_k": 3}},
        answers={"a": "[y]", "b": "z"},
    )  # fmt: skip
    found = compare_runs(one, two)
    assert found.configuration == [
        Change("config.max_tokens", 8, 4), Change("config.sampling.top_k", None, 3),
    ]  # fmt: skip
    assert found.versions == [Change("llmpi", "1", "2")]
    assert found.machines == [Change("rank 0.host", "a", "b")]
    assert json.loads(json.dumps(found.as_data()))["answers"]["different"] == 1
    said = io.StringIO()
    found.print(said)
    for words in ("config.max_tokens: 8 before, 4 now", "rank 0.host: a before, b now", "[y] [stop]", "new: b"):
        assert words in said.getvalue()


def test_a_rank_that_one_run_had_alone_is_one_change_and_the_number_of_ranks_comes_first(tmp_path: Path) -> None:
    found = compare_runs(run_dir(tmp_path / "1", ranks=[1, 2, 10]), run_dir(tmp_path / "2", ranks=[0, 2], host="b"))
    assert found.machines == [
        Change("ranks", 3, 2), Change("rank 0", None, "b, CPU"), Change("rank 1", "a, CPU", None),
        Change("rank 2.host", "a", "b"), Change("rank 10", "a, CPU", None),
    ]  # fmt: skip
    said = io.StringIO()
    found.print(said)
    assert "rank 0: none before, b, CPU now" in said.getvalue()


def test_a_run_that_never_had_workers_is_compared(tmp_path: Path) -> None:
    found = compare_runs(run_dir(tmp_path / "1", ranks=[]), run_dir(tmp_path / "2"))
    assert Change("rank 0", None, "a, CPU") in found.machines
