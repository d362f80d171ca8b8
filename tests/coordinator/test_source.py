"""Requests out of files and iterables: nothing lost, nothing doubled, a bad one fails alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import inputfile
from coordinator.inputfile import check_file, line_blocks
from coordinator.source import Arrival, FileSource, IterableSource, Source, same_input
from scheduling.errors import InputError
from scheduling.requests import Message, Request, Sampling, parse_request
from tests.coordinator.inputs import WriteFile, jsonl


def read_all(source: Source, max_requests: int = 3, max_bytes: int = 1 << 20) -> list[Arrival]:
    arrivals = []
    while not source.ended:
        batch = source.read(max_requests, max_bytes)
        assert len(batch) <= max_requests
        arrivals += batch
    return arrivals


def prompts_of(arrivals: list[Arrival]) -> list[object]:
    return [parse_request(arrival.line).prompt for arrival in arrivals]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("precheck", [True, False])
def test_requests_arrive_in_order_with_ids_limits_and_lines_a_worker_can_parse(
    write: WriteFile, precheck: bool
) -> None:
    batch = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "b", "max_completion_tokens": 9}}
    path = write(
        "\ufeff"
        + jsonl({"prompt": "a", "max_tokens": 5}, {}, {"custom_id": "x", **batch}, batch)
        .replace("{}\n", "\r\n")
        .replace("\n", "\r\n")
        + '{"prompt": "last, no newline", "id": 7, "custom_id": null}'
    )
    source = FileSource(path, precheck=precheck, defaults=Sampling(max_tokens=33))
    assert source.total == (4 if precheck else None)
    arrivals = read_all(source)
    assert source.total == 4
    assert [(a.index, a.custom_id, a.max_tokens) for a in arrivals] == [
        (0, "request-0", 5),
        (1, "x", 9),
        (2, "request-2", 9),
        (3, "7", 33),
    ]
    assert [parse_request(a.line).custom_id for a in arrivals] == [a.custom_id for a in arrivals]
    assert prompts_of(arrivals) == ["a", "b", "b", "last, no newline"]
    assert all(a.error is None and a.prompt_tokens_estimate > 0 for a in arrivals)
    assert source.read(10, 1000) == []


@pytest.mark.parametrize("precheck", [True, False])
def test_a_request_for_embeddings_is_expected_to_put_out_nothing(write: WriteFile, precheck: bool) -> None:
    lines = jsonl({"input": "a"}, {"url": "/v1/embeddings", "body": {"input": ["b", "c"]}}, {"prompt": "d"})
    arrivals = read_all(FileSource(write(lines), precheck=precheck, defaults=Sampling(max_tokens=33)))
    assert [arrival.max_tokens for arrival in arrivals] == [0, 0, 33]
    assert [parse_request(arrival.line).kind for arrival in arrivals] == ["embedding", "embedding", "completion"]


@pytest.mark.parametrize("precheck", [True, False])
def test_each_line_of_a_text_file_is_a_prompt_with_its_spaces(write: WriteFile, precheck: bool) -> None:
    path = write('  Was ist "das"?\r\n\n   \n{"prompt": 1}\n末', "a.txt")
    arrivals = read_all(FileSource(path, precheck=precheck))
    assert prompts_of(arrivals) == ['  Was ist "das"?', '{"prompt": 1}', "末"]
    assert [a.custom_id for a in arrivals] == ["request-0", "request-1", "request-2"]


def test_a_read_gives_no_more_requests_or_bytes_than_asked_but_at_least_one(write: WriteFile) -> None:
    source = FileSource(write(jsonl(*({"prompt": "x" * 100, "id": k} for k in range(10)))))
    assert len(source.read(4, 10_000)) == 4
    assert len(source.read(4, 150)) == 2
    assert len(source.read(4, 1)) == 1
    assert [a.index for a in read_all(source)] == [7, 8, 9]


def test_without_a_check_a_bad_line_fails_alone_under_its_own_id(write: WriteFile) -> None:
    path = write(
        b'{"prompt": "a"}\nnonsense\n{"id": "x", "prompt": 3}\n{"prompt": "\xff"}\n{"prompt": "b"}\n'
        rb'{"custom_id": "half", "prompt": "\ud800"}'
        b"\n"
        rb'{"custom_id": "\ud800", "prompt": NaN}'
    )
    arrivals = read_all(FileSource(path, precheck=False))
    assert [(a.custom_id, a.error is None) for a in arrivals] == [
        ("request-0", True),
        ("request-1", False),
        ("x", False),
        ("request-3", False),
        ("request-4", True),
        ("half", False),
        ("request-6", False),
    ]
    assert "UTF-8" in str(arrivals[3].error)


def test_without_a_check_a_line_over_the_limit_fails_alone(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"block_bytes": 100, "line_bytes_max": 1_000, "on_block": None}
    monkeypatch.setattr(line_blocks, "__kwdefaults__", limits)
    path = write(jsonl({"prompt": "a"}, {"prompt": "x" * 5_000}, {"prompt": "b"}))
    arrivals = read_all(FileSource(path, precheck=False))
    assert [a.error is None for a in arrivals] == [True, False, True]
    with pytest.raises(InputError, match="line 2: the line has 5,0"):
        FileSource(path)


@pytest.mark.parametrize("per_read", [1, 2, 10])
def test_without_a_check_the_second_use_of_an_id_fails_alone(write: WriteFile, per_read: int) -> None:
    path = write(jsonl(*({"prompt": "a", "id": name} for name in "abacab")))
    arrivals = read_all(FileSource(path, precheck=False), per_read)
    assert [a.error is None for a in arrivals] == [True, True, False, True, False, False]
    assert 'custom_id "a"' in str(arrivals[2].error)


@pytest.mark.parametrize("precheck", [True, False])
def test_done_requests_are_passed_over_and_the_others_keep_their_numbers(write: WriteFile, precheck: bool) -> None:
    path = write("\n".join(json.dumps({"prompt": f"p{k}"}) for k in range(8)))
    done = np.array([True, False, True, True, False])
    arrivals = read_all(FileSource(path, precheck=precheck, done=done))
    assert [a.index for a in arrivals] == [1, 4, 5, 6, 7]
    assert prompts_of(arrivals) == ["p1", "p4", "p5", "p6", "p7"]


def test_a_duplicate_that_failed_earlier_does_not_fail_the_request_it_repeats(write: WriteFile) -> None:
    """Killed after line 2 had failed as a repetition of line 0, and before line 0 was done: line 0 must run."""
    path = write(jsonl({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}, {"prompt": "c", "id": "x"}))
    arrivals = read_all(FileSource(path, precheck=False, done=np.array([False, False, True])))
    assert [arrival.index for arrival in arrivals] == [0, 1]
    assert [arrival.error for arrival in arrivals] == [None, None]


def test_a_duplicate_of_a_done_request_still_fails(write: WriteFile) -> None:
    path = write(jsonl({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}, {"prompt": "c", "id": "x"}))
    arrivals = read_all(FileSource(path, precheck=False, done=np.array([True])))
    assert [(a.index, a.error is None) for a in arrivals] == [(1, True), (2, False)]


def test_a_run_that_is_all_done_ends(write: WriteFile) -> None:
    path = write(jsonl({"prompt": "a"}, {"prompt": "b"}))
    for precheck in (True, False):
        assert read_all(FileSource(path, precheck=precheck, done=np.ones(2, np.bool_))) == []


def test_a_long_stretch_of_done_requests_does_not_hold_up_one_read(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.source.SKIPPED_BYTES_MAX", 50)
    source = FileSource(write(jsonl(*({"prompt": "a"} for _ in range(10)))), done=np.arange(10) < 9)
    assert source.read(5, 1000) == []
    assert not source.ended
    assert [a.index for a in read_all(source)] == [9]


def test_a_line_can_be_fetched_again_after_a_check_only(write: WriteFile) -> None:
    path = write('\ufeff{"prompt": "a"}\n\n\n{"prompt": "b", "id": 5}\n\n')
    source = FileSource(path)
    lines = {a.index: a.line for a in read_all(source)}
    assert [source.fetch(0), source.fetch(1), source.fetch(2)] == [lines[0], lines[1], None]
    assert FileSource(path, precheck=False).fetch(0) is None


def test_the_check_reports_how_far_it_is(write: WriteFile) -> None:
    seen: list[tuple[int, int]] = []
    path = write(jsonl(*({"prompt": "a"} for _ in range(5))))
    check_file(path, "jsonl", Sampling(), lambda done, total: seen.append((done, total)), max_tokens=512)
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


@settings(max_examples=25)
@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), max_size=12))
def test_what_is_written_is_read(rows: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    path.write_text("\n" + jsonl(*({"prompt": row} for row in rows)) + '{"prompt": "end"}', encoding="utf-8")
    for precheck in (True, False):
        assert prompts_of(read_all(FileSource(path, precheck=precheck))) == [*rows, "end"]


# ---------------------------------------------------------------- identity


def test_an_identity_tells_inputs_apart_with_and_without_a_check(write: WriteFile) -> None:
    one = write(jsonl({"prompt": "a"}), "one.jsonl")
    other = write(jsonl({"prompt": "b"}), "other.jsonl")
    checked, quick = FileSource(one).identity(), FileSource(one, precheck=False).identity()
    assert "sha256" in checked
    assert "sha256" not in quick
    assert same_input(checked, quick)
    assert not same_input(quick, FileSource(other).identity())
    assert not same_input(quick, FileSource(one, format="text", precheck=False).identity())


# ---------------------------------------------------------------- Python objects


def test_an_iterable_may_mix_strings_dicts_and_requests() -> None:
    request = Request(custom_id="r", kind="chat", sampling=Sampling(temperature=1.0), messages=(Message("user", "c"),))
    source = IterableSource(["a", {"prompt": "b", "max_tokens": 3}, request], Sampling(temperature=0.0))
    arrivals = read_all(source)
    assert source.total == 3
    assert [a.custom_id for a in arrivals] == ["request-0", "request-1", "r"]
    assert parse_request(arrivals[2].line, Sampling(temperature=0.0)) == request
    assert arrivals[1].max_tokens == 3
    assert source.fetch(0) is None


def test_an_iterable_is_consumed_no_further_than_asked() -> None:
    taken: list[int] = []

    def endless() -> Any:
        for k in range(10**9):
            taken.append(k)
            yield f"prompt {k}"

    source = IterableSource(endless())
    assert len(source.read(5, 10**6)) == 5
    assert taken == [0, 1, 2, 3, 4]
    assert source.total is None
    assert not source.ended


def test_bad_objects_in_an_iterable_fail_alone() -> None:
    bad: list[Any] = ["a", 5, {"prompt": float("nan")}, {"prompt": "b", "top_q": 1}, "\ud800", {"prompt": "c"}, ""]
    arrivals = read_all(IterableSource(iter(bad)))
    assert [a.error is None for a in arrivals] == [True, False, False, False, False, True, False]


@pytest.mark.parametrize("prompts", ["one prompt", {"prompt": "a"}, 5])
def test_a_single_prompt_in_place_of_a_list_is_refused(prompts: Any) -> None:
    with pytest.raises(InputError, match=r"\[prompt\]"):
        IterableSource(prompts)


def test_an_iterable_passes_over_done_requests() -> None:
    source = IterableSource(["a", "b", "c"])
    source.skip(np.array([True, False]))
    assert [a.index for a in read_all(source)] == [1, 2]


# ---------------------------------------------------------------- memory

# Not getrusage: there the peak of the process that forked this one counts too.
_READ_ALL = """
import sys
from pathlib import Path
from coordinator.source import FileSource
source = FileSource(Path(sys.argv[1]), precheck=sys.argv[2] == "True")
count = 0
while not source.ended:
    count += len(source.read(256, 1 << 20))
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(count, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precheck", [True, False])
def test_memory_does_not_grow_with_the_text_of_the_input(tmp_path: Path, precheck: bool) -> None:
    path = tmp_path / "big.jsonl"
    with open(path, "w") as file:
        for index in range(30_000):
            file.write(f'{{"custom_id": "q{index}", "prompt": "{"x" * 3_300}"}}\n')
    command = [sys.executable, "-c", _READ_ALL, str(path), str(precheck)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    count, peak_kib = map(int, done.stdout.split())
    assert count == 30_000
    assert peak_kib < 100 * 1024  # the text alone is 100 MB; Python with numpy takes 32 MiB


# ---------------------------------------------------------------- how long requests are


def test_lengths_are_learnt_by_the_check_and_without_it_by_looking_ahead(write: WriteFile) -> None:
    rows = [{"prompt": [1] * 100, "max_tokens": 50}, {"prompt": [1] * 1000, "n": 3}]
    path = write(jsonl(*rows))
    for precheck in (True, False):
        lengths = FileSource(path, precheck=precheck, max_tokens=200).lengths
        assert lengths is not None
        assert (lengths.sequences, dict(lengths.counts), lengths.whole) == (4, {1: 1, 5: 3}, True)


def test_looking_ahead_is_bounded_and_passes_over_bad_lines(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputfile, "LOOK_AHEAD_LINES", 3)
    path = write('{"prompt": [1]}\nno request\n{"prompt": [1]}\n{"prompt": [1, 2, 3]}\n')
    lengths = FileSource(path, precheck=False, max_tokens=10).lengths
    assert lengths is not None
    assert (lengths.sequences, lengths.longest_tokens, lengths.whole) == (2, 11, False)


def test_lines_of_text_have_lengths(write: WriteFile) -> None:
    path = write("a prompt\n\nanother\n", "in.txt")
    for precheck in (True, False):
        lengths = FileSource(path, precheck=precheck, max_tokens=10).lengths
        assert lengths is not None
        assert (lengths.sequences, lengths.longest_tokens) == (2, 19)
