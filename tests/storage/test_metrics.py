"""metrics.h5: whole or not there, readable without us, and equal however often it is made."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest

from scheduling.errors import RecordError, RunDirError
from scheduling.histogram import BUCKETS, LogHistogram
from scheduling.recordline import encode_failure
from scheduling.tables import COPY, FINISH_REASONS, RANK, REQUEST, TELEMETRY
from storage.files import OsDisk
from storage.metrics import read_copies, read_requests, read_summary, read_telemetry, write_metrics
from storage.recovery import rows as record_rows
from storage.summary import Rows
from tests.launch import ROOT
from tests.storage.hdf5_rules import check_any_reader_takes
from tests.storage.samples import ok_line, rows

ATTRIBUTES = {"run_id": "r", "ranks": 3, "wall_s": 1.5, "hosts": ["n1", "n2"], "gpu": None, "seed": np.int64(7)}


def ranks() -> Rows:
    table = np.zeros(2, RANK)
    table["rank"] = [1, 2]
    table["host"] = [b"n1", b"n2"]
    table["device"] = [b"GPU-0", b"CPU"]
    table["requests"] = [600, 400]
    table["busy_s"] = [1.25, math.nan]
    return table


def telemetry(count: int = 4) -> Rows:
    table = np.zeros(count, TELEMETRY)
    table["gpu"] = -1
    table["power_w"] = np.nan
    table["rss_bytes"] = 1 << 33
    return table


def histograms() -> dict[str, LogHistogram]:
    ttft, itl = LogHistogram(), LogHistogram()
    ttft.add(np.array([0.1, 0.2, 0.4]))
    itl.add_sparse([100, 200], [5, 6])
    return {"ttft": ttft, "itl": itl}


def write(path: Path, chunks: list[Rows] | None = None) -> None:
    given = chunks if chunks is not None else [rows(600, 1), rows(400, 2)]
    write_metrics(path, iter(given), ranks(), histograms(), [telemetry(3), telemetry(1)], ATTRIBUTES)


def test_copies_are_read_back_and_an_older_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.h5"
    copies = np.array([(7, 2, 0, 1, 3, 2.5, 4.0, 1), (8, 2, 0, 1, 3, 2.5, np.nan, -1)], COPY)
    write_metrics(path, [rows(1, 1)], ranks(), histograms(), telemetry(1), ATTRIBUTES, copies=copies)
    assert read_copies(path).tobytes() == copies.tobytes()
    write(path)
    assert len(read_copies(path)) == 0
    with h5py.File(path, "r+") as file:
        del file["copies"]
    assert read_copies(path).dtype == COPY


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.h5"
    write(path)
    found = read_summary(path)
    assert found.summary.ok == 1000
    assert found.attributes["hosts"] == ["n1", "n2"]
    assert found.attributes["wall_s"] == 1.5
    assert found.attributes["seed"] == 7
    assert "gpu" not in found.attributes, "what is unknown is not there"
    assert found.ranks.tobytes() == ranks().tobytes()
    assert found.histograms["ttft"].counts.tolist() == histograms()["ttft"].counts.tolist()
    assert found.histograms["ttft"].sum_s == pytest.approx(0.7)
    assert found.histograms["itl"].count == 11
    assert found.telemetry_samples == 4
    assert np.isnan(read_telemetry(path)["power_w"]).all()
    assert np.concatenate(list(read_requests(path))).tobytes() == np.concatenate([rows(600, 1), rows(400, 2)]).tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.h5"]


def test_the_file_explains_itself_to_any_hdf5_reader(tmp_path: Path) -> None:
    write(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r") as file:
        assert set(file) == {"requests", "ranks", "histograms", "telemetry", "copies"}
        requests = file["requests"]
        assert requests.dtype == REQUEST
        assert requests.chunks is not None
        assert requests.compression == "gzip"
        assert requests.attrs["ttft_s_unit"] == "s"
        assert requests.attrs["tpot_s_formula"].startswith("(e2e_s - ttft_s) / (output_tokens - 1)")
        assert list(requests.attrs["finish_reasons"]) == [f"{n}={name}" for name, n in FINISH_REASONS.items()]
        assert file["telemetry"].attrs["missing"] == "NaN, or -1 for integers; never 0"
        assert file["histograms/edges_s"].shape == (BUCKETS + 1,)
        assert math.isnan(file["histograms/itl"].attrs["sum_s"])
        for name in ("requests", "ranks", "telemetry", "copies"):
            for field in file[name].dtype.names:
                if field.endswith("_s") and field not in ("starved_slot_s", "open_slot_s"):
                    assert f"{field}_unit" in file[name].attrs
                assert file[name].dtype[field].kind in "iufS", "plain numbers and fixed texts only"


def test_every_type_filter_and_link_is_one_that_matlab_and_any_other_reader_knows(tmp_path: Path) -> None:
    attributes = ATTRIBUTES | {"fault_tolerant": True, "none": [], "reason": "a\udc80b\0c", "many": ["x"] * 3}
    write_metrics(tmp_path / "m.h5", iter([rows(600, 1)]), ranks(), histograms(), [telemetry(3)], attributes)
    seen = check_any_reader_takes(tmp_path / "m.h5")
    assert {"/requests", "/ranks", "/telemetry", "/histograms/edges_s", "/histograms/itl", "@fault_tolerant"} < set(
        seen
    )
    found = read_summary(tmp_path / "m.h5").attributes
    assert (found["fault_tolerant"], found["reason"], found["many"]) == (1, "a?b?c", ["x"] * 3)


@pytest.mark.parametrize("value", [np.array([True]), np.void(b"x"), h5py.Empty("f8"), np.float16(1)])
def test_what_some_readers_do_not_know_would_be_found(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        file.attrs["odd"] = value
    with pytest.raises(AssertionError, match="odd"):
        check_any_reader_takes(tmp_path / "m.h5")


@pytest.mark.parametrize("option", [{"compression": "lzf"}, {"chunks": None}, {"dtype": h5py.string_dtype()}])
def test_a_dataset_that_some_readers_do_not_know_would_be_found(tmp_path: Path, option: dict[str, Any]) -> None:
    write(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        file.create_dataset("odd", (4,), **{"dtype": "f8", "chunks": (2,), **option})
    with pytest.raises(AssertionError, match="odd"):
        check_any_reader_takes(tmp_path / "m.h5")


def test_it_is_compressed(tmp_path: Path) -> None:
    write(tmp_path / "m.h5", [rows(50_000)])
    with h5py.File(tmp_path / "m.h5", "r") as file:
        assert file["requests"].id.get_storage_size() < 0.8 * 50_000 * REQUEST.itemsize


def test_pandas_reads_its_tables(tmp_path: Path) -> None:
    write(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r") as file:
        requests = pandas.DataFrame(file["requests"][:])
        found = pandas.DataFrame(file["ranks"][:])
    answered = requests[requests.ok == 1]
    expected = np.concatenate([rows(600, 1), rows(400, 2)])
    assert answered.e2e_s.quantile(0.5) == pytest.approx(np.median(expected["e2e_s"]))
    assert requests.output_tokens.sum() == expected["output_tokens"].sum()
    assert all(kind.kind in "iuf" for kind in requests.dtypes)
    assert found.host.str.decode("utf-8").tolist() == ["n1", "n2"]


LOCKED = """
import sys, fcntl
from pathlib import Path
from tests.storage.test_metrics import write
from storage.metrics import read_copies, read_summary
path = Path(sys.argv[1])
write(path)
with open(path, "r+b") as other:
    fcntl.flock(other, fcntl.LOCK_EX)  # what another program whose HDF5 locks would hold
    assert read_summary(path).summary.ok == 1000
    write(path)
print(read_summary(path).summary.ok)
"""


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("locking", ["FALSE", "TRUE"])
def test_it_is_written_and_read_whatever_hdf5_is_told_of_locks(tmp_path: Path, locking: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HDF5_USE_FILE_LOCKING": locking}
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "m.h5")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "1000\n", done.stderr


FULL = """
import resource, sys
from pathlib import Path
from scheduling.errors import RecordError
from storage.metrics import read_copies, read_summary
from tests.storage.samples import rows
from tests.storage.test_metrics import write
path = Path(sys.argv[1])
write(path)
for room_bytes in (0, 1_000, 30_000, 200_000, 500_000, 900_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, resource.RLIM_INFINITY))
    try:
        write(path, [rows(40_000)])
    except RecordError as error:
        print(error)
    assert len(list(path.parent.iterdir())) == 1
    assert read_summary(path).summary.ok == 1000, "the old one stays"
"""


@pytest.mark.slow
@pytest.mark.system
def test_a_disk_that_is_full_while_hdf5_writes_is_one_clear_line(tmp_path: Path) -> None:
    """In a process of its own: what HDF5 could not write must not come back when the process ends."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL, str(tmp_path / "m.h5")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all("File too large" in line and "same command again" in line for line in lines)


def test_making_it_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_metrics_from_the_record_equal_its_rows(tmp_path: Path) -> None:
    record = tmp_path / "results.jsonl"
    record.write_bytes(ok_line(1) + encode_failure("id", 0, 2, 1, 0, "test", "no", 5) + ok_line(2))
    path = tmp_path / "metrics.h5"
    write_metrics(path, record_rows(record), np.zeros(0, RANK), {}, np.zeros(0, TELEMETRY), {})
    found = read_summary(path)
    assert (found.summary.ok, found.summary.failed, found.summary.output_tokens) == (2, 1, 6)
    assert found.telemetry_samples == 0
    assert next(iter(read_requests(path)))["index"].tolist() == [1, 0, 2]


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.h5"
    write(path)
    before = path.read_bytes()

    def broken() -> Iterator[Rows]:
        yield rows(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_metrics(path, broken(), ranks(), {}, telemetry(), {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.h5"]


def test_a_disk_that_refuses_is_a_record_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match="answers are safe"):
        write(tmp_path / "no such folder" / "metrics.h5")

    def full(disk: OsDisk, *paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OsDisk, "rename", full)
    with pytest.raises(RecordError, match="No space left"):
        write(tmp_path / "metrics.h5")
    assert list(tmp_path.iterdir()) == []

    def read_only(disk: OsDisk, *paths: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(OsDisk, "rename", read_only)
    with pytest.raises(RecordError, match=r"Read-only file system\. .* or `llmpi report` on a copy"):
        write(tmp_path / "metrics.h5")


def test_rows_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/requests"):
        write(tmp_path / "m.h5", [telemetry()])


def test_what_is_no_metrics_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="llmpi report --rebuild"):
        read_summary(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(RunDirError, match="llmpi report"):
        read_summary(tmp_path / "text.h5")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(RunDirError, match="no metrics file"):
        read_summary(tmp_path / "other.h5")
