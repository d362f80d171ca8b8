"""What `llmpi report` does with a run directory that has lost something, or is called something odd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.reporting import PAGE_NAME, ReportOptions, show_report
from coordinator.statusline import state_line, status_data
from scheduling.errors import RunDirError
from storage.recovery import RECORD_NAME
from storage.rundir import METRICS_NAME
from storage.runstatus import status
from tests.coordinator.runs import make_run

GONE = "results.jsonl is gone, and with it the answers"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Its answers had all been synced."""
    path = make_run(tmp_path / "run", 10)
    record = path / RECORD_NAME
    record.with_suffix(".synced").write_text(f"{record.stat().st_size}\n")
    return path


def test_figures_of_a_run_whose_record_is_gone_say_whose_they_are(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_report([run_dir], ReportOptions())
    out = capsys.readouterr().out
    assert (GONE in out, "are gone from it" in out) == (False, False)
    size = (run_dir / RECORD_NAME).stat().st_size
    (run_dir / RECORD_NAME).unlink()
    before = (run_dir / METRICS_NAME).read_bytes()
    segments = next((run_dir / "metrics.d").iterdir())
    segments.touch()  # newer than metrics.h5
    show_report([run_dir], ReportOptions())
    out = capsys.readouterr().out
    assert f"0 of 10 done (0 answered, 0 failed), not complete: the same command resumes it. {size:,} bytes of" in out
    assert f"{GONE}. These figures are those of metrics.h5" in out
    assert "10 answered" in out
    assert GONE in (run_dir / PAGE_NAME).read_text()
    with pytest.raises(RunDirError, match=r"has lost its results\.jsonl: metrics\.h5 cannot be made anew"):
        show_report([run_dir], ReportOptions(rebuild=True))
    assert (run_dir / METRICS_NAME).read_bytes() == before


def test_a_record_that_was_cut_is_said_to_lack_what_had_been_counted(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run_dir / RECORD_NAME).read_bytes().splitlines(keepends=True)
    (run_dir / RECORD_NAME).write_bytes(b"".join(lines[:4]))
    found = status(run_dir)
    assert found.lost_bytes == status_data(found)["lost_bytes"] == sum(map(len, lines[4:]))
    show_report([run_dir], ReportOptions(no_html=True, rebuild=True))
    out = capsys.readouterr().out
    assert state_line(found) in out
    assert "4 answered, 0 failed, in" in out


def test_runs_of_any_names_stand_side_by_side(tmp_path: Path) -> None:
    names = ["$x^{", "a$\\frac$b", "<b>&amp;", "bell\a", os.fsdecode(b"latin \xfc"), "two\nlines"]
    runs = [make_run(tmp_path / name, 10) for name in names]
    show_report(runs, ReportOptions(html=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    for shown in ("$x^{", "a$\\frac$b", "&lt;b&gt;&amp;amp;", "bell\N{REPLACEMENT CHARACTER}"):
        assert f">{shown}</text>" in page
    assert "<b>&amp;" not in page
