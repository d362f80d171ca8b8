"""What is done to a session: every kind of fault, at the times that its weather gives.

Faults that come at any time are in `AT_ANY_TIME`, by the names that `weather.RATES_PER_S` has for them. Each one says
whether there was anything that it could be done to; only then it is counted. Those that come with something else
(messages, writes, collectives, starting engines) are drawn where that happens.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from storage.files import replace_file
from storage.recovery import RECORD_NAME
from tests.simulation.disk import Outside, SimulatedDisk
from tests.simulation.engines import SimulatedEngine
from tests.simulation.rank0 import FAST_S, Incident
from tests.simulation.ranks import WorkerRank
from tests.simulation.world import World

NUMBERS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
NOTICED_S = 0.5
"""How soon a launcher ends the job when one of its ranks has died, at most."""
OPEN_MPI_PATIENCE_S = 0.2
"""Between the SIGTERM that mpirun passes on and its SIGKILL."""


class Faults:
    """Of one session. `power_lost`: the machine of rank 0 went down, not only its processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.power_lost = False
        self._dice = world.dice("faults")
        for kind, rate in world.weather.rates_per_s.items():
            self._plan(kind, rate)
        self._plan_operations()
        self._plan_goodbyes()
        world.agenda.at(world.weather.calm_at_s, self._calm_down)

    def _calm_down(self) -> None:
        if not self.world.calm:
            self.world.calm_down()

    def _plan(self, kind: str, rate: float) -> None:
        at_s = self.world.agenda.now_s + self._dice.expovariate(rate)
        if at_s < self.world.weather.calm_at_s:
            self.world.agenda.at(at_s, lambda: self._strike(kind, rate))

    def _strike(self, kind: str, rate: float) -> None:
        if self.world.calm or self.world.rank0.dead:
            return
        if AT_ANY_TIME[kind](self, self._dice):
            self.world.trace.fault(self.world.agenda.now_s, kind)
        self._plan(kind, rate)

    def _plan_operations(self) -> None:
        """At which operations on disk something happens."""
        world, dice = self.world, self._dice
        if world.calm:
            return
        if dice.random() < world.weather.chance("crash at a write"):
            power = dice.random() < 0.5
            world.rank0.incidents.append(self._incident(do=lambda: self._end(power)))
        if dice.random() < world.weather.chance("disk error at a write"):
            incident = self._incident(number=dice.choice(NUMBERS), count=dice.choice((1, 1, 3, 1000)))
            world.rank0.incidents.append(incident)
        if dice.random() < world.weather.chance("rank dies in a collective") and world.workers:
            victim = dice.choice(sorted(world.workers))
            noticed = dice.random() < 0.7
            world.workers[victim].dies_in_collective = lambda: self._die_in_collective(victim, noticed)

    def _plan_goodbyes(self) -> None:
        """Whom something meets as the job ends: before it says goodbye, or soon after."""
        world, dice = self.world, self.world.dice("goodbyes")
        for kind, meets in (("rank dies as the job ends", self._dies), ("rank stops as the job ends", self._stops)):
            if not world.calm and world.workers and dice.random() < world.weather.chance(kind):
                rank = world.workers[dice.choice(sorted(world.workers))]
                rank.at_goodbye = partial(self._at_goodbye, kind, rank, meets, dice)

    def _at_goodbye(self, kind: str, rank: WorkerRank, meets: Callable[[WorkerRank], None], dice: Random) -> None:
        def meet() -> None:
            if rank.alive and not rank.ended and not self.world.calm and not self.world.rank0.dead:
                self.world.trace.fault(self.world.agenda.now_s, kind, rank.rank)
                meets(rank)

        if dice.random() < 0.5:
            meet()
        else:
            self.world.agenda.after(0.1 * dice.random(), meet)

    def _dies(self, rank: WorkerRank) -> None:
        self.world.worker_dies(rank.rank)
        if self._dice.random() < 0.7:
            self._death_is_noticed(rank.rank)

    def _stops(self, rank: WorkerRank) -> None:
        rank.stop()
        if self._dice.random() < 0.7:
            self._after(0.1, 2.0 * self.world.shape.config.lease_s, rank.go_on)

    def _incident(self, **options: Any) -> Incident:
        """At some operation, or at some operation on the record."""
        dice = self._dice
        if dice.random() < 0.5:
            return Incident(int(2 ** dice.uniform(0.0, 7.0)), None, dice.random() < 0.5, **options)
        return Incident(int(2 ** dice.uniform(0.0, 5.0)), RECORD_NAME, dice.random() < 0.7, **options)

    def _die_in_collective(self, victim: int, noticed: bool) -> None:
        self.world.trace.fault(self.world.agenda.now_s, "rank dies in a collective", victim)
        self.world.worker_dies(victim)
        if noticed:
            self._death_is_noticed(victim)

    def _death_is_noticed(self, rank: int) -> None:
        """Where MPI does not tolerate it the launcher ends the whole job."""
        if self.world.shape.fault_tolerant:
            self.world.death_is_told(rank)
            return
        self.world.agenda.after(self._dice.uniform(0.0, NOTICED_S), lambda: self._end(power=False))

    def _end(self, power: bool) -> None:
        """Rank 0's process ends, and all others with it."""
        if not self.world.rank0.dead:
            self.power_lost = power
            self.world.everyone_dies()

    # ------------------------------------------------------------ who is struck

    def _engine(self) -> SimulatedEngine | None:
        engines = list(self.world.engines().values())
        return self._dice.choice(engines) if engines else None

    def _rank(self) -> WorkerRank | None:
        ranks = [rank for rank in self.world.workers.values() if rank.alive and not rank.ended]
        leaders = self.world.shape.leaders
        leading = [rank for rank in ranks if list(leaders.values()).count(rank.rank) > 1]
        if leading and self._dice.random() < 0.4:
            ranks = leading  # they are few, and more depends on them
        return self._dice.choice(ranks) if ranks else None

    def _after(self, least_s: float, most_s: float, do: Callable[[], None]) -> None:
        self.world.agenda.after(self._dice.uniform(least_s, most_s), do)

    # ------------------------------------------------------------ engines

    def engine_killed(self, dice: Random) -> bool:
        engine = self._engine()
        if engine is None:
            return False
        engine.kill(
            dice.choice(("it was killed by signal 9", "it was killed by signal 11", "it was killed by signal 6"))
        )
        return True

    def engine_hangs(self, dice: Random) -> bool:
        engine = self._engine()
        if engine is None or engine.hangs:
            return False
        engine.hang(for_good=dice.random() < 0.3)
        if not engine.for_good:
            self._after(0.1, 15.0, engine.go_on)
        return True

    def engine_stalls_in_part(self, dice: Random) -> bool:
        engine = self._engine()
        return engine is not None and not engine.hangs and engine.stall()

    def engine_slows_down(self, dice: Random) -> bool:
        engine = self._engine()
        if engine is None:
            return False
        engine.slowness = dice.choice((3.0, 10.0))
        return True

    # ------------------------------------------------------------ worker ranks

    def rank_killed(self, dice: Random) -> bool:
        rank = self._rank()
        if rank is None:
            return False
        self.world.worker_dies(rank.rank)
        self._death_is_noticed(rank.rank)
        return True

    def rank_vanishes(self, dice: Random) -> bool:
        rank = self._rank()
        if rank is None:
            return False
        self.world.worker_dies(rank.rank)
        return True

    def rank_stopped(self, dice: Random) -> bool:
        rank = self._rank()
        if rank is None:
            return False
        rank.stop()
        self._after(0.1, 2.0 * self.world.shape.config.lease_s, rank.go_on)
        return True

    def rank_raises(self, dice: Random) -> bool:
        engine = self._engine()
        if engine is None:
            return False
        engine.broken = RuntimeError("an error of the worker's own")
        return True

    def link_cut(self, dice: Random) -> bool:
        rank = self._rank()
        if rank is None:
            return False
        self.world.network.cut(rank.rank)
        self._after(0.1, 2.0 * self.world.shape.config.lease_s, lambda: self.world.network.heal(rank.rank))
        return True

    # ------------------------------------------------------------ rank 0 and its machine

    def rank0_killed(self, dice: Random) -> bool:
        self._end(power=False)
        return True

    def power_goes(self, dice: Random) -> bool:
        self._end(power=True)
        return True

    def rank0_stopped(self, dice: Random) -> bool:
        self.world.rank0.stop_for(dice.uniform(0.1, 2.0 * self.world.shape.config.lease_s))
        return True

    def disk_fails_for_a_while(self, dice: Random) -> bool:
        self.disk_fails_for_good(dice)
        self._after(0.01, 5.0, self._disk_is_right)
        return True

    def disk_fails_for_good(self, dice: Random) -> bool:
        self.world.rank0.failing = dice.choice(NUMBERS)
        return True

    def _disk_is_right(self) -> None:
        self.world.rank0.failing = None

    def disk_slows_down(self, dice: Random) -> bool:
        self.world.rank0.latency_s = dice.choice((0.02, 0.3, 2.0, 8.0))
        self._after(0.1, 5.0, self._disk_is_fast)
        return True

    def _disk_is_fast(self) -> None:
        self.world.rank0.latency_s = FAST_S

    def clock_jumps(self, dice: Random) -> bool:
        self.world.rank0.wall_jump_s += dice.choice((-86_400.0, -10.0, 10.0, 86_400.0))
        return True

    # ------------------------------------------------------------ people and schedulers

    def asked_to_stop(self, dice: Random) -> bool:
        """As `llmpi stop` does it, from another process."""
        run_dir = self.world.shape.run_dir
        if not self.world.storage.content(run_dir / "run.json"):
            return False
        replace_file(SimulatedDisk(self.world.storage, Outside()), run_dir / "stop", b"stop\n")
        self.world.asked_to_stop = True
        return True

    def signalled(self, dice: Random) -> bool:
        """The first, the second, and what Open MPI does some time after a SIGTERM."""
        number = dice.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
        self.world.signals._note(number, None)
        self.world.asked_to_stop = True
        if self.world.shape.launcher == "openmpi" and self.world.shape.size > 1 and number == signal.SIGTERM:
            self.world.agenda.after(OPEN_MPI_PATIENCE_S, lambda: self._end(power=False))
        return True


AT_ANY_TIME: dict[str, Callable[[Faults, Random], bool]] = {
    "engine killed": Faults.engine_killed,
    "engine hangs": Faults.engine_hangs,
    "engine stalls in part": Faults.engine_stalls_in_part,
    "engine slows down": Faults.engine_slows_down,
    "rank killed": Faults.rank_killed,
    "rank vanishes": Faults.rank_vanishes,
    "rank stopped": Faults.rank_stopped,
    "rank raises": Faults.rank_raises,
    "rank 0 killed": Faults.rank0_killed,
    "rank 0 stopped": Faults.rank0_stopped,
    "machine loses power": Faults.power_goes,
    "link cut": Faults.link_cut,
    "disk fails for a while": Faults.disk_fails_for_a_while,
    "disk fails for good": Faults.disk_fails_for_good,
    "disk slows down": Faults.disk_slows_down,
    "asked to stop": Faults.asked_to_stop,
    "signal": Faults.signalled,
    "clock jumps": Faults.clock_jumps,
}
