"""The report as a person sees it, and as data."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from coordinator.doctor.findings import Report, error, merged, ok, size_text, time_text, warning
from coordinator.doctor.show import print_to
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK

FINE = ok("library", "Open MPI", "n1", "n2")
ODD = warning("open files", "at most 256", "raise it", "n1", command="ulimit -n 1024")
WRONG = error(
    "GPU build", "GPU present, CPU-only build", "install it for CUDA", "n2", command="CMAKE_ARGS=… pip " + "x" * 150
)


def shown(report: Report, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_to(Console(file=stream, width=width, force_terminal=False, highlight=False), report)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_exit_codes() -> None:
    assert Report({"MPI": (FINE,)}).exit_code() == EXIT_OK
    assert Report({"MPI": (FINE, ODD)}).exit_code() == EXIT_OK
    assert Report({"MPI": (FINE, ODD), "GPUs": (WRONG,)}).exit_code() == EXIT_INFRASTRUCTURE == 4


@pytest.mark.parametrize("width", [80, 120])
def test_every_level_has_a_word_and_errors_come_first_at_the_end(width: int) -> None:
    text = shown(Report({"MPI": (FINE, ODD), "GPUs": (WRONG,)}), width)
    for words in ("✓ ok", "! warning", "✗ error", "all hosts: Open MPI", "n1: at most 256"):
        assert words in text
    summary = text.partition("1 error, 1 warning")[2]
    assert 0 < summary.index("✗ error  GPUs: GPU build") < summary.index("! warning  MPI: open files")
    assert "→ install it for CUDA" in summary
    # What is to be typed is on one line, however long, and all else fits.
    assert WRONG.command in summary
    assert max(len(line.rstrip()) for line in text.splitlines() if "xxx" not in line) <= width


def test_a_section_of_one_check_is_named_once() -> None:
    found = warning("processors", "3 ranks on 2 processors", "start fewer", "n1")
    assert "! warning  processors\n" in shown(Report({"processors": (found,)}), 80)


def test_a_terminal_that_knows_ascii_alone_can_show_it() -> None:
    report = Report({"MPI": (FINE, error("a", "/é: b", "c", command="sbatch …"))})
    assert "x error" in shown(report, 80, "ascii")


def test_nothing_to_mend_is_said() -> None:
    assert "nothing to mend" in shown(Report({"MPI": (FINE,)}), 80)


def test_data_is_what_is_shown() -> None:
    data = Report({"MPI": (FINE,), "GPUs": (WRONG,)}).data()
    assert (data["level"], data["errors"], data["warnings"]) == ("error", 1, 0)
    assert data["subjects"]["GPUs"][0] == {
        "check": "GPU build", "level": "error", "found": WRONG.found, "remedy": WRONG.remedy, "command": WRONG.command,
        "where": ("n2",),
    }  # fmt: skip


def test_the_same_on_several_hosts_is_said_once() -> None:
    assert merged([ok("a", "b", "n1"), ok("a", "c", "n3"), ok("a", "b", "n2")]) == [
        ok("a", "b", "n1", "n2"), ok("a", "c", "n3")
    ]  # fmt: skip


def test_units() -> None:
    assert [size_text(value) for value in (5, 2048, 1.5 * (1 << 30), 3 << 40)] == ["5 B", "2 KiB", "1.5 GiB", "3 TiB"]
    assert [time_text(value) for value in (2.5, 0.0123, 4e-6, -0.5)] == ["2.5 s", "12.3 ms", "4 us", "-500 ms"]
