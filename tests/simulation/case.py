"""One seed: the same command again and again in its weather, until the run is complete.

First faults come, and every session may end in any way that the product promises. Once it is calm nothing new goes
wrong and what could heal has healed: then everything must finish, within a stated time and few sessions.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from coordinator import lead, report, serve, setup, versions
from coordinator.config import JobConfig
from coordinator.engines import ModelFacts
from coordinator.relays import leaders_of
from coordinator.setup import Setup
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_RESUMABLE, EXIT_SOME_FAILED
from scheduling.messages import Host
from storage import joblock, metrics, rundir
from storage.joblock import Holder, Judge
from storage.runstatus import Status
from tests.simulation import weather, work
from tests.simulation.agenda import Trace, ViolationError
from tests.simulation.disk import Storage
from tests.simulation.engines import Temper
from tests.simulation.faults import Faults
from tests.simulation.oracles import Books
from tests.simulation.world import Ended, Shape, World

STORMY_SESSIONS_MAX = 12
"""Then it becomes calm, whatever the weather says."""
CALM_SESSIONS_MAX = 4
"""Sessions that may be needed once it is calm, beside one for each request that ends its engines."""
SESSION_S = 1_000.0
"""Simulated seconds within which a session must end once it is calm. Most of it is the patience with collectives."""


@dataclass(frozen=True)
class Outcome:
    """What came of a seed. `violation` empty: everything held."""

    seed: int
    violation: str
    story: list[str]
    digest: str
    events: int
    faults: Counter[str]
    sessions: int
    simulated_s: float
    requests: int


@dataclass
class Case:
    """See the module's text."""

    seed: int
    folder: Path
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        dice = Random(f"{self.seed} case")
        size = dice.choice((1, 2, 3, 3, 4, 5, 6))
        self.work = work.draw(dice, max_tokens=40)
        self.weather = weather.draw(Random(f"{self.seed} weather"), size)
        self.shape = self._shape(dice, size)
        self._lead(Random(f"{self.seed} leaders"), size)
        self._part(Random(f"{self.seed} goodbyes"))
        self.shape.input.write_bytes(self.work.content)
        self.storage = Storage(self.shape.run_dir.parent)
        self.books = Books(self.work, self.storage, self.shape.run_dir, self.shape.config)
        self.now_s = 0.0
        self.sessions = 0
        self.calm_sessions = 0
        self.dropped = 0
        """Answers that rank 0 did not want, in the last session that had a loop."""

    def _shape(self, dice: Random, size: int) -> Shape:
        config = JobConfig(
            model="none", engine="null", device="cpu", slots=4, max_tokens=40, seed=self.work.run_seed,
            schedule=dice.choice(("work-stealing", "work-stealing", "round-robin")),
            precheck=self.work.precheck,
            prefetch=dice.choice((None, None, 0, 1, 4)),
            lease_s=dice.choice((2.5, 5.0, 10.0)),
            rank0_lease_s=dice.choice((None, 6.0, 20.0)),
            engine_lease_s=dice.choice((1.5, 4.0, 12.0)),
            request_timeout_s=2.0 if dice.random() < 0.1 else None,
            max_deaths=dice.choice((2, 3, 3)),
            commit_interval_s=dice.choice((0.001, 0.05, 0.05, 0.5)),
            commit_bytes=dice.choice((1, 2_000, 16 << 20)),
            metrics_interval_s=dice.choice((0.3, 2.0, 10.0)),
            coordinator_works=True if size > 1 and dice.random() < 0.15 else None,
        )  # fmt: skip
        tempers = {
            rank: Temper(
                slots=dice.choice((1, 2, 4)),
                load_s=dice.uniform(0.05, 2.0),
                max_tokens=40,
                token_s=dice.uniform(0.002, 0.03) * (6.0 if rank in self.weather.slow_ranks else 1.0),
            )
            for rank in range(size)
        }
        simulated = Setup(config, ModelFacts(""), "simulated", "simulated", Host(hostname="node", cpus=(0, 1)))
        return Shape(
            self.seed, size, simulated, self.folder / "in.jsonl", self.folder / "disk" / "run", tempers,
            dice.choice(("openmpi", "mpich")), dice.choice((3.0, 8.0, 20.0)), dice.random() < 0.4,
            {},
        )  # fmt: skip

    def _lead(self, dice: Random, size: int) -> None:
        """In some seeds of several workers there are leaders, of one host or of two, and in most of these more ranks
        than elsewhere stop or die."""
        if size < 3 or dice.random() < 0.4:
            return
        workers, cut = list(range(1, size)), dice.choice((0, dice.randint(1, size - 2)))
        leaders = leaders_of([part for part in (workers[:cut], workers[cut:]) if part], dice.choice((2, 3, 8, 8)))
        more = dice.choice(({}, {"rank stopped": 0.5}, {"rank vanishes": 0.6}, {"rank killed": 0.3}))
        self.weather = replace(self.weather, rates_per_s=self.weather.rates_per_s | more)
        tolerant = self.shape.fault_tolerant or "rank killed" in more
        self.shape = replace(self.shape, leaders=leaders, fault_tolerant=tolerant)

    def _part(self, dice: Random) -> None:
        """In some seeds that are not quiet, sessions end in the midst of trouble."""
        if (self.weather.rates_per_s or self.weather.chances) and dice.random() < 0.25:
            kind = dice.choice(("rank dies as the job ends", "rank stops as the job ends"))
            self.weather = replace(self.weather, chances=self.weather.chances | {kind: 0.7})

    # ------------------------------------------------------------ sessions

    def run(self) -> None:
        """Sessions until the run is complete, and then the same command once more."""
        while True:
            ended, told = self._session()
            if ended.code in (EXIT_OK, EXIT_SOME_FAILED):
                break
            self.now_s += Random(f"{self.seed} {self.sessions}").uniform(0.5, 10.0)
        assert told is not None
        self.books.judge_complete(told, self.dropped)
        self.weather = replace(self.weather, calm_at_s=min(self.now_s, self.weather.calm_at_s))
        again, _ = self._session()
        if again.code != ended.code:
            raise ViolationError(
                f"the same command on a complete run ended with {again.code}, before with {ended.code}"
            )

    def _session(self) -> tuple[Ended, Status | None]:
        if self.sessions >= STORMY_SESSIONS_MAX and self.now_s < self.weather.calm_at_s:
            self.weather = replace(self.weather, calm_at_s=self.now_s)
        calm = self.now_s >= self.weather.calm_at_s
        self.calm_sessions += calm
        if self.calm_sessions > CALM_SESSIONS_MAX + len(self.work.poison):
            raise ViolationError("the run is not complete, however often it is resumed")
        world = World(self.shape, self.sessions, self.now_s, self.trace, self.weather, self.storage, self.books)
        world.rank0.deadline_s = max(self.now_s, self.weather.calm_at_s) + SESSION_S
        world.rank0.why_deadline = f"it has been calm for {SESSION_S:.0f} s and the session has not ended"
        faults = Faults(world)
        ended = world.run()
        self.sessions += 1
        if world.lead is not None and (coordinator := world.lead.session.coordinator) is not None:
            self.dropped = len(coordinator.dropped)
        self.now_s = world.agenda.now_s
        if faults.power_lost:
            self.storage.power_lost(world.dice("power"))
        else:
            self.storage.processes_died()
        told = self.books.judge_between()
        self._judge_end(ended, told, calm)
        return ended, told

    def _judge_end(self, ended: Ended, told: Status | None, calm: bool) -> None:
        """The exit status is one of those promised, and says what the run directory says."""
        if ended.code is None:
            if calm:
                raise ViolationError("the job was ended though nothing went wrong")
            return
        if ended.code not in (EXIT_OK, EXIT_SOME_FAILED, EXIT_RESUMABLE, EXIT_INFRASTRUCTURE):
            raise ViolationError(f"a session ended with status {ended.code}: {ended.error}")
        if ended.error.startswith(("BugError", "ProtocolError", "HandshakeError")):
            raise ViolationError(f"a session ended with {ended.error}")
        if ended.code in (EXIT_OK, EXIT_SOME_FAILED) and (told is None or told.exit_code != ended.code):
            raise ViolationError(f"a session ended with status {ended.code}, and the run directory says {told}")


def simulate(seed: int, folder: Path) -> Outcome:
    """Run one seed in `folder`, which is empty. To be called within `in_simulation`."""
    case = Case(seed, folder)
    violation = ""
    try:
        case.run()
    except ViolationError as error:
        violation = str(error)
    except Exception:
        violation = f"an exception of its own:\n{traceback.format_exc()}"
    trace = case.trace
    return Outcome(
        seed, violation, trace.story() if violation else [], trace.digest(), trace.events, trace.faults, case.sessions,
        case.now_s, len(case.work.expected),
    )  # fmt: skip


class _NoFormulas(dict[str, str]):
    """Has none, and says nothing when asked for one."""

    def __missing__(self, name: str) -> str:
        return ""


class _Compact:
    """`json` without indentation, which is the slow way."""

    loads = json.loads

    @staticmethod
    def dumps(value: Any, *, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, **options)


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder for what must be real files, in memory where there is such a place."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if os.access(shared_memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="simulate-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def in_simulation(folder: Path) -> Iterator[None]:
    """Make this process ready for simulations in `folder`.

    What takes long in each session, and is nothing to them, is left out meanwhile: units, formulas and compression in
    metrics.h5, indentation in run.json, the table that is printed at the end, the collection of cycles.
    """
    told = cache(versions.package_versions)
    with contextlib.ExitStack() as patches:
        for module in (setup, lead):
            patches.enter_context(mock.patch.object(module, "package_versions", told))
        patches.enter_context(mock.patch.object(serve, "calm_collector", contextlib.nullcontext))
        patches.enter_context(mock.patch.object(report, "report_data", return_value={}))
        patches.enter_context(mock.patch.object(metrics, "CHUNK_ROWS", 64))
        patches.enter_context(mock.patch.object(metrics, "_STORAGE", {"track_times": False}))
        patches.enter_context(mock.patch.object(metrics, "UNITS", {table: {} for table in metrics.UNITS}))
        patches.enter_context(mock.patch.object(metrics, "FORMULAS", _NoFormulas()))
        patches.enter_context(mock.patch.object(rundir, "json", _Compact))
        patches.enter_context(mock.patch.object(joblock, "Judge", partial(Judge, reaches=lambda path: True)))
        patches.enter_context(
            mock.patch.object(rundir, "this_process", return_value=Holder("node", 1, "2026-01-01T00:00:00Z", 1))
        )
        (folder / "disk" / "run").mkdir(parents=True)
        yield
