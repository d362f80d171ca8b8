"""How a command begins and ends, in processes of their own: signals that come while it loads, and its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coordinator import entry, launch
from tests.launch import ROOT

# The command is one of the test's own; what matters is what is around it.
PROGRAM = """
import atexit, os, signal, sys, types
atexit.register(print, "registered before")
from coordinator import entry
from coordinator.signals import StopSignals
def command():
    atexit.register(print, "registered after")
    BODY
sys.modules["coordinator.cli"] = types.SimpleNamespace(main=command)
sys.argv = ["llmpi", *sys.argv[1:]]
entry.main()
"""
RANK = {"PMI_RANK": "0"}


def test_a_rank_is_known_by_any_variable_that_a_launcher_numbers_it_with() -> None:
    """They stand in both places, because nothing else is to be loaded first."""
    assert set(entry.RANK_VARIABLES) == {signs.rank for signs in launch._KNOWN}


def run(body: str, *words: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.replace("BODY", body)
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environ}, cwd=Path("/"),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("words", [["batch"], ["study", "scaling"]])
def test_a_signal_that_comes_while_a_rank_loads_is_counted_once_it_listens(words: list[str], name: str) -> None:
    body = f"signal.raise_signal(signal.{name})\n    with StopSignals() as s: print(s.count, s.name)"
    done = run(body, *words, environ=RANK)
    assert done.returncode == 0, done.stderr
    assert f"1 {name}\n" in done.stdout


def test_a_command_that_nobody_drains_is_ended_by_a_signal_as_ever() -> None:
    assert run("signal.raise_signal(signal.SIGUSR2)", "status", environ=RANK).returncode < 0
    assert run("signal.raise_signal(signal.SIGUSR2)", "study", "show", environ=RANK).returncode < 0
    assert run("signal.raise_signal(signal.SIGUSR2)", "batch", environ={}).returncode < 0


def test_ctrl_c_while_a_command_loads_ends_it_without_a_traceback() -> None:
    done = run("raise KeyboardInterrupt", "batch", environ={})
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_of_ours_is_given_the_number_of_a_stream_that_was_closed(closed: str, tmp_path: Path) -> None:
    """Else what a library prints would stand in it."""
    body = (
        "with open('record', 'w') as f: print(f.fileno(), file=f)\n"
        "    os.write(1, b'x'); os.write(2, b'x'); print('y'); print('y', file=sys.stderr); print(sys.stdin.read())"
    )
    command = [sys.executable, "-c", PROGRAM.replace("BODY", body), "batch"]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, cwd=tmp_path, env=environ, input=b"", capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert int((tmp_path / "record").read_text()) > 2


def test_the_end_looks_for_no_cycles_and_keeps_the_status_and_what_registered() -> None:
    body = (
        "class Late:\n        def __del__(self): os.write(1, b'found')\n    late = Late(); late.own = late; sys.exit(3)"
    )
    done = run(body, "batch", environ=RANK)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "registered after\nregistered before\n"
    assert run("raise ValueError", "batch", environ=RANK).returncode == 1
