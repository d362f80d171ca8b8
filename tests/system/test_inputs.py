"""Inputs of every kind, exports and replays by the command line, on the simulated engine."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.launch import ROOT, Argument, Launcher, run_alone, start_alone
from tests.system.runs import PATIENCE_S, Run, check_one_clear_line

pytestmark = [pytest.mark.system, pytest.mark.slow]

ROWS = [{"id": f"q{k}", "question": f'what is {k},\n"here"?', "language": "en"} for k in range(12)]
SIMULATED = ("-m", "any-name", "--engine", "simulated", "--ctx", 256, "--slots", 4, "--time-scale", "0")
ASKED: tuple[Argument, ...] = ("--template", "In {language}: {question}", "--id-column", "id", "--max-tokens", 6)


def batch(run: Run, given: Argument, *options: Argument) -> tuple[Argument, ...]:
    return ("batch", *SIMULATED, "-i", given, "-o", run.path, *options)


def texts(run: Run) -> dict[str, str]:
    return {name: line["response"]["body"]["choices"][0]["text"] for name, line in run.by_id().items()}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def test_a_table_of_any_kind_gives_the_same_answers(tmp_path: Path, table: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    half = len(ROWS) // 2
    pq.write_table(pa.Table.from_pylist(ROWS[:half]), folder / "1.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[half:])
    (folder / "2.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    runs = [Run(tmp_path / "csv"), Run(tmp_path / "mixed")]
    for run, given in zip(runs, (table, folder), strict=True):
        done = run_alone(*batch(run, given, *ASKED))
        assert done.rc == 0, done.output
        assert f"converted {given}: 12 requests in " in done.stderr
        run.check_whole([row["id"] for row in ROWS])
    assert texts(runs[0]) == texts(runs[1])
    again = run_alone(*batch(runs[0], table, *ASKED))
    assert again.rc == 0
    assert "converted" not in again.stderr
    table.write_bytes(table.read_bytes() + b"q99,new,en\r\n")
    check_one_clear_line(run_alone(*batch(runs[0], table, *ASKED)), 2, "input.source.bytes")


@pytest.mark.mpi
def test_standard_input_reaches_rank_0_and_is_needed_once(mpirun: Launcher, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    given = tmp_path / "lines.gz"
    given.write_bytes(gzip.compress(b"".join(b'{"prompt": "line %d", "max_tokens": 4}\n' % k for k in range(40))))
    words = batch(run, "-")
    shell = 'given=$1; python=$2; shift 2; cat "$given" | "$python" -m llmpi "$@"'
    program = ("-c", shell, "sh", given, mpirun.python, *words, "--ranks", 2)
    with start_alone(program=program, python=Path("/bin/sh"), env=mpirun.env) as job:
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    assert "converted standard input: 40 requests" in done.stderr
    ids = [f"request-{k}" for k in range(40)]
    run.check_whole(ids)
    assert run.about()["sessions"][0]["ranks"] == 2
    (run.path / "results.jsonl").write_bytes(b"".join((run.path / "results.jsonl").read_bytes().splitlines(True)[:10]))
    resumed = run_alone(*words)
    assert resumed.rc == 0, resumed.output
    assert "standard input is not read again" in resumed.stderr
    run.check_whole(ids)
    if mpirun.kind == "openmpi":  # its mpirun never says that standard input has ended; MPICH's does
        check_one_clear_line(mpirun(2, *batch(Run(tmp_path / "new"), "-")), 2, "standard input", "--ranks")


def test_a_pipe_is_an_input(tmp_path: Path, table: Path) -> None:
    run = Run(tmp_path / "run")
    words = [sys.executable, "-m", "llmpi", *map(str, batch(run, "-", "--format", "csv", *ASKED))]
    with table.open("rb") as file:
        done = subprocess.run(
            words, stdin=file, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S, check=False
        )
    assert done.returncode == 0, done.stderr
    run.check_whole([row["id"] for row in ROWS])


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.csv", b"a,b\n1,2\n", (), ("no column 'prompt'", "'a', 'b'")),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 50, mtime=0)[:-9], (), ("cut off",)),
        ("a.csv", b"prompt\nx\n\"\"\n", (), ("a.csv, row 2", "prompt")),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    run = Run(tmp_path / "run")
    check_one_clear_line(run_alone(*batch(run, tmp_path / name, *options)), 2, *words)
    assert not (run.path / "run.json").exists()


def test_answers_are_exported_as_tables(tmp_path: Path, table: Path) -> None:
    run = Run(tmp_path / "run")
    assert run_alone(*batch(run, table, *ASKED)).rc == 0
    expected = [(row["id"], texts(run)[row["id"]]) for row in ROWS]
    target = tmp_path / "answers.parquet"
    done = run_alone("export", run.path, "--to", "parquet", "-o", target)
    assert done.rc == 0, done.output
    rows: list[dict[str, Any]] = pq.read_table(target).to_pylist()
    assert [(row["custom_id"], row["text"]) for row in rows] == expected
    assert all(row["output_tokens"] == 6 and row["e2e_s"] > 0 for row in rows)
    said = run_alone("export", run.path, "--to", "csv").stdout
    assert [(row["custom_id"], row["text"]) for row in csv.DictReader(io.StringIO(said))] == expected
    plain = run_alone("export", run.path).stdout.splitlines()
    assert [json.loads(line)["custom_id"] for line in plain] == [row["id"] for row in ROWS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.parquet", "rows.csv", "run"]


def test_a_run_is_done_again_from_its_directory_alone(tmp_path: Path, table: Path) -> None:
    first, again, other = (Run(tmp_path / name) for name in ("first", "again", "other"))
    assert run_alone(*batch(first, table, *ASKED, "--seed", 7)).rc == 0
    table.unlink()
    done = run_alone("batch", "--replay", first.path, "-o", again.path, "-q")
    assert done.rc == 0, done.output
    assert "configuration: the same" in done.stdout
    assert "answers: 12 equal, 0 different, 0 missing" in done.stdout
    assert texts(again) == texts(first)
    changed = run_alone("batch", "--replay", again.path, "-o", other.path, "--max-tokens", 3, "--json")
    assert changed.rc == 0, changed.output
    found = json.loads(changed.stdout)["replay"]
    assert found["configuration"] == [{"what": "config.max_tokens", "before": 6, "after": 3}]
    assert found["answers"]["different"] == 12
    assert found["answers"]["shown"][0]["what"] == "q0"
    with (first.path / "requests.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    refused = run_alone("batch", "--replay", first.path, "-o", tmp_path / "new")
    check_one_clear_line(refused, 2, "was changed since", "requests.jsonl")
    assert not (tmp_path / "new").exists()


CONVERT = """
import sys
from pathlib import Path
from coordinator.convert import convert, source_of
from coordinator.rows import Columns

source = source_of(Path(sys.argv[1]), None, Columns(template="Q: {question}"))
convert(source, Path(sys.argv[2]), strict=True)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", ["csv.gz", "parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, kind: str) -> None:
    rows = [("some words\n" + "and more " * 50, "never read" * 20)] * 1_000
    peaks = []
    for times in (10, 80):
        path = tmp_path / f"{times}.{kind}"
        if kind == "parquet":
            part = pa.table({"question": [one for one, _ in rows], "other": [two for _, two in rows]})
            pq.write_table(pa.concat_tables([part] * times), path, use_dictionary=False, row_group_size=10_000)
        else:
            with gzip.open(path, "wt", 1, newline="") as file:
                csv.writer(file).writerow(("question", "other"))
                for _ in range(times):
                    csv.writer(file).writerows(rows)
        words: list[str | Path] = [sys.executable, "-c", CONVERT, path, tmp_path]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S, check=True)
        peaks.append(int(done.stdout))
    assert (tmp_path / "requests.jsonl").stat().st_size > 35 << 20
    assert peaks[1] - peaks[0] < 18 << 10, "KiB"
