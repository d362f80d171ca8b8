"""Real jobs under random faults, drawn from a seed, with what must hold after each of them.

A schedule says which processes of a job meet what, and how many answers are recorded by then: it does not depend on
how fast the machine is. A job that was ended is started again, until the run is whole or its turns are used up. `play`
raises AssertionError for the first thing that does not hold; afterwards the answers are those of an undisturbed run.

    python -m tests.system.chaos --seeds N [--first K] [--mpirun PATH] [--without-ulfm]

plays N schedules and ends with a line that counts faults by kind. Exit status 0 if everything held; a schedule that did
not hold prints a line that plays it again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from tests.launch import Argument, Finished, Job, Launcher, find_launcher, run_alone
from tests.system.runs import Line, Run, engines_of, lives, ranks_of, write_lines
from tests.tiny_model import tiny_model_beside

Engine = Literal["simulated", "tiny"]
Fault = Literal[
    "engine SIGKILL", "engine SIGSEGV", "engine SIGABRT", "engine SIGSTOP", "rank SIGKILL", "rank SIGSTOP",
    "rank 0 SIGKILL", "job SIGTERM", "job SIGKILL",
]  # fmt: skip

ENGINE_DEATHS: tuple[Fault, ...] = ("engine SIGKILL", "engine SIGSEGV", "engine SIGABRT")
STOPS: tuple[Fault, ...] = ("engine SIGSTOP", "rank SIGSTOP")
ENDS: tuple[Fault, ...] = ("rank SIGKILL", "rank 0 SIGKILL", "job SIGTERM", "job SIGKILL")
"""Faults after which the same command has to be given again. Not always: MPI may survive the death of a rank."""
DEATHS_MAX = 2
"""Deaths of engines in one job: a third that meets the same request fails it, as it should."""
REQUESTS = {"simulated": 240, "tiny": 48}
TIME_SCALE = 0.035
"""Of the simulated engine, for each worker: all schedules take equally long."""
TURNS_MAX = 8
GONE_S = 90.0
"""Within this time a job that was killed is gone, and one that starts has its engines; a loaded machine takes half."""
WHOLE_S = 240.0
"""Bounds a job that nothing disturbs any more."""


def ends(fault: Fault, ulfm: bool) -> bool:
    """Whether a job that meets it is over; with ULFM one goes on when a rank dies, if it can."""
    return fault in ENDS and not (ulfm and fault == "rank SIGKILL")


@dataclass(frozen=True)
class Act:
    """`fault` meets the process number `victim` (of those there are, modulo) once `lines` answers are recorded."""

    lines: int
    fault: Fault
    victim: int
    stopped_s: float = 0.0
    """How long it is stopped, where the fault is that."""


@dataclass(frozen=True)
class Schedule:
    """What a seed stands for."""

    seed: int
    engine: Engine
    ranks: int
    ulfm: bool
    policy: str
    acts: tuple[Act, ...]

    def __str__(self) -> str:
        told = ", ".join(f"{act.fault} at {act.lines}" for act in self.acts)
        ulfm = ", ULFM" if self.ulfm else ""
        return f"seed {self.seed}: {self.engine} engine, {self.ranks} ranks{ulfm}, {self.policy}: {told}"


def schedule_of(seed: int, *, ulfm: bool = True) -> Schedule:
    """The schedule of a seed. `ulfm`: whether the MPI at hand can be asked to survive deaths."""
    dice = random.Random(seed)
    engine: Engine = dice.choice(("simulated", "simulated", "tiny"))
    ranks = dice.randint(3, 6 if engine == "simulated" else 4)
    with_ulfm, policy = dice.random() < 0.4, dice.choice(("work-stealing", "work-stealing", "round-robin"))
    faults: list[Fault] = []
    deaths = 0
    for _ in range(dice.randint(2, 5)):
        dying = ENGINE_DEATHS if deaths < DEATHS_MAX else STOPS
        kinds = (dying, dying, dying, STOPS, ENDS, ENDS)
        fault = dice.choice(dice.choice(kinds))
        deaths = 0 if ends(fault, with_ulfm) else deaths + (fault in ENGINE_DEATHS)
        faults.append(fault)
    places = sorted(dice.randint(1, REQUESTS[engine] * 4 // 5) for _ in faults)
    acts = tuple(
        Act(place, fault, dice.randrange(60), dice.choice((0.2, 1.0, 4.0)) if fault in STOPS else 0.0)
        for place, fault in zip(places, faults, strict=True)
    )
    return Schedule(seed, engine, ranks, with_ulfm and ulfm, policy, acts)


# ---------------------------------------------------------------- the work


def requests(engine: Engine) -> list[Line]:
    """Requests of many shapes and lengths; no two neighbours are equally long."""
    lines: list[Line] = []
    for k in range(REQUESTS[engine]):
        line: Line = {"custom_id": f"r{k}", "max_tokens": 8 + 7 * (k % 11), "temperature": int(k % 4 > 0)}
        if k % 5:
            line["prompt"] = f"Of copper and lamps, number {k}: " + "seven rivers " * (k % 7)
        else:
            line["messages"] = [{"role": "user", "content": f"Say something about the number {k}."}]
        if k % 3 == 0:
            line["ignore_eos"] = True
        lines.append(line)
    return lines


def words(schedule: Schedule, model: Path, given: Path, run: Run) -> tuple[Argument, ...]:
    """The command, without its launcher."""
    common: tuple[Argument, ...] = ("-i", given, "-o", run.path, "--ctx", 512, "-q")
    intervals = ("--metrics-interval", "0.5", "--commit-interval", "0.01", "--lease", "3")
    if schedule.engine == "tiny":
        # Else the last bits of its logits depend on what else runs, and with them some answer (docs/determinism.md).
        alone = ("--slots", 1, "--no-speculate", "--no-prefix-reuse", "--threads", 1)
        return ("batch", "-m", model, *common, *intervals, *alone, "--schedule", schedule.policy)
    simulated = ("--slots", 4, "--engine", "simulated", "--time-scale", f"{TIME_SCALE * (schedule.ranks - 1):g}")
    return ("batch", "-m", "any", *simulated, *common, *intervals, "--schedule", schedule.policy)


def answers(run: Run) -> dict[str, Any]:
    return {name: line["response"]["body"]["choices"] for name, line in run.by_id().items()}


@dataclass
class World:
    """What schedules are played with. Undisturbed runs are made once for each engine."""

    launcher: Launcher
    real_model: Path
    folder: Path
    undisturbed: dict[Engine, dict[str, Any]] = field(default_factory=dict)

    def model(self) -> Path:
        return tiny_model_beside(self.real_model, self.folder)

    def input(self, engine: Engine) -> Path:
        return write_lines(self.folder / f"{engine}.jsonl", requests(engine))

    def expected(self, engine: Engine) -> dict[str, Any]:
        """The answers of a run that nothing disturbs."""
        if engine not in self.undisturbed:
            calm = Schedule(0, engine, 2, False, "work-stealing", ())
            run = Run(self.folder / f"undisturbed-{engine}")
            hasty = ("--time-scale", "0") if engine == "simulated" else ()
            done = run_alone(*words(calm, self.model(), self.input(engine), run), *hasty)
            assert done.rc == 0, done.output
            self.undisturbed[engine] = answers(run)
        return self.undisturbed[engine]


# ---------------------------------------------------------------- what must hold


def until(holds: Callable[[], bool], limit_s: float) -> bool:
    """Whether `holds` came to be true within the time."""
    pause, deadline = threading.Event(), time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.02)
    return True


def check_gone(job: Job, seen: Iterable[psutil.Process]) -> None:
    """Nothing of the job is left, though its launcher may have been killed with no time to tell anybody."""
    left = {process.pid: process for process in seen}

    def gone() -> bool:
        left.update((process.pid, process) for process in job.processes())
        for pid in [pid for pid, process in left.items() if not lives(process)]:
            del left[pid]
        return not left

    assert until(gone, GONE_S), f"left running {GONE_S:g} s after the job: {list(left.values())}\n{job.stderr}"


def check_after(run: Run, before: dict[str, Line]) -> tuple[dict[str, Line], bool]:
    """What must hold between jobs. Returns the record, and whether the run is whole.

    Nothing that was recorded has changed; `llmpi status` says what the record says.
    """
    record = run.by_id()
    for name, line in before.items():
        assert record.get(name) == line, f"{name} was recorded, and now its line is {record.get(name)}"
    if not (run.path / "run.json").exists():
        assert not record
        return record, False
    status = run_alone("status", run.path, "--json")
    assert status.rc in (0, 3), status.output
    told = json.loads(status.stdout)
    assert told["exit_code"] == status.rc
    assert told["done"] == len(record), (told, len(record))
    assert not told["running"], told
    assert told["complete"] == (status.rc == 0) == bool(run.about()["complete"])
    return record, status.rc == 0


def check_code(done: Finished, faults: list[Fault], whole: bool) -> None:
    """The exit status is what was promised for what the job met."""
    assert "Traceback" not in done.stderr, done.output
    lost = [fault for fault in faults if fault in ENDS or fault == "rank SIGSTOP"]
    if not lost:
        assert done.rc == 0, done.output
        assert whole, done.output
    if done.rc == 0:
        assert whole, f"status 0, and the run is not whole\n{done.output}"
    if "job SIGKILL" in faults:
        assert done.rc == -signal.SIGKILL, done.output


def check_end(run: Run, expected: dict[str, Any]) -> None:
    """The run is what an undisturbed one is, and its metrics add up."""
    run.check_whole(expected)
    found = answers(run)
    differ = [name for name, choices in expected.items() if found[name] != choices]
    assert not differ, f"{differ[0]} of {len(differ)}: {found[differ[0]]} instead of {expected[differ[0]]}"
    rows = run.metrics()["requests"]
    assert (rows["attempt"] <= 1 + sum(1 for _ in ENDS) + DEATHS_MAX).all()


# ---------------------------------------------------------------- playing


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it was there to get the signal."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def victims(job: Job, act: Act) -> list[psutil.Process]:
    """The processes that an act may meet; none while they start or once they have ended."""
    if act.fault.startswith("engine"):
        return sorted(engines_of(job), key=lambda process: process.pid)
    ranks = {rank_number(process): process for process in ranks_of(job)}
    return [
        process
        for number, process in sorted(ranks.items())
        if number >= 0 and (number == 0) == (act.fault == "rank 0 SIGKILL")
    ]


def rank_number(process: psutil.Process) -> int:
    try:
        environ = process.environ()
    except psutil.Error:
        return -1
    return int(environ.get("OMPI_COMM_WORLD_RANK") or environ.get("PMI_RANK") or -1)


def strike(job: Job, act: Act) -> bool:
    """Carry out an act. False if the job ended before."""
    if act.fault == "job SIGTERM":
        job.process.send_signal(signal.SIGTERM)
        return True
    if act.fault == "job SIGKILL":
        os.killpg(job.process.pid, signal.SIGKILL)
        return True
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = victims(job, act)
        return bool(found) or job.process.poll() is not None

    assert until(there, GONE_S), f"no victim for {act}\n{job.stderr}"
    if not found or job.process.poll() is not None:
        return False
    victim = found[act.victim % len(found)]
    number = signal.Signals[act.fault.split()[-1]]
    if not send(victim, number):
        return False
    if number is signal.SIGSTOP:
        until(lambda: job.process.poll() is not None, act.stopped_s)
        send(victim, signal.SIGCONT)
    return True


def disturb(job: Job, run: Run, acts: list[Act], ulfm: bool, met: list[Fault], seen: dict[int, psutil.Process]) -> None:
    """Carry out acts, taking them from `acts`, until one ends the job or none is left."""
    while acts:
        act = acts[0]
        reached = until(lambda: run.lines_so_far() >= act.lines or job.process.poll() is not None, WHOLE_S)  # noqa: B023
        assert reached, f"only {run.lines_so_far()} answers, waiting for {act}\n{job.stdout}\n{job.stderr}"
        seen.update((process.pid, process) for process in job.processes())
        if job.process.poll() is not None:
            return
        acts.pop(0)
        if strike(job, act):
            met.append(act.fault)
            if ends(act.fault, ulfm):
                return


def play(schedule: Schedule, world: World, folder: Path) -> Counter[str]:
    """Play a schedule in `folder`. Returns how often each fault was met, and jobs as 'jobs'.

    Raises:
        AssertionError: something does not hold.
    """
    expected = world.expected(schedule.engine)
    run = Run(folder / "run")
    command = words(schedule, world.model(), world.input(schedule.engine), run)
    options = ("--with-ft", "ulfm") if schedule.ulfm else ()
    acts, counts, record = list(schedule.acts), Counter[str](), dict[str, Line]()
    for _ in range(TURNS_MAX):
        met: list[Fault] = []
        seen: dict[int, psutil.Process] = {}
        with world.launcher.start(schedule.ranks, *command, mpi_options=options) as job:
            disturb(job, run, acts, schedule.ulfm, met, seen)
            done = job.wait(WHOLE_S)
            check_gone(job, seen.values())
        counts.update([*met, "jobs"])
        record, whole = check_after(run, record)
        check_code(done, met, whole)
        if whole:
            check_end(run, expected)
            return counts
    raise AssertionError(f"not whole after {TURNS_MAX} jobs: {len(record)} of {len(expected)}\n{done.output}")


# ---------------------------------------------------------------- many seeds


@contextmanager
def _world(mpirun: Path | None) -> Iterator[World]:
    launcher = find_launcher(Path(sys.executable) if mpirun is None else mpirun.parent / "python")
    if launcher is None:
        sys.exit("no mpirun beside this Python or on PATH; name one with --mpirun")
    root = Path(__file__).resolve().parents[2]
    given = os.environ.get("LLMPI_TEST_MODEL")
    real = Path(given) if given else root / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not real.is_file():
        sys.exit("no real model for its tokenizer: set LLMPI_TEST_MODEL, or run `make model`")
    with tempfile.TemporaryDirectory(prefix="llmpi-chaos-") as folder:
        yield World(launcher, real, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.chaos", description="Real jobs under random faults.")
    parser.add_argument("--seeds", type=int, required=True, help="how many schedules to play")
    parser.add_argument("--first", type=int, default=1, help="the first one's seed")
    parser.add_argument("--mpirun", type=Path, help="mpirun beside the python that llmpi is installed for")
    parser.add_argument("--without-ulfm", action="store_true", help="never ask Open MPI to survive a rank's death")
    asked = parser.parse_args()
    began_s, counts, failed = time.monotonic(), Counter[str](), []
    with _world(asked.mpirun) as world:
        ulfm = world.launcher.kind == "openmpi" and not asked.without_ulfm
        for seed in range(asked.first, asked.first + asked.seeds):
            schedule = schedule_of(seed, ulfm=ulfm)
            print(schedule, flush=True)
            try:
                with tempfile.TemporaryDirectory(dir=world.folder) as folder:
                    counts += play(schedule, world, Path(folder))
            except (AssertionError, subprocess.SubprocessError):
                traceback.print_exc()
                failed.append(seed)
                print(f"again: python -m tests.system.chaos --seeds 1 --first {seed}", flush=True)
            else:
                print(f"seed {seed} held, {time.monotonic() - began_s:.0f} s", flush=True)
    jobs = counts.pop("jobs", 0)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    result = f"failed: {', '.join(map(str, failed))}" if failed else "all held"
    took_s = time.monotonic() - began_s
    print(f"{asked.seeds} seeds, {jobs} jobs, {counts.total()} faults ({kinds}), {took_s:.0f} s: {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
