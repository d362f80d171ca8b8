"""Rank 0's side of a job from the handshake to the last goodbye, whatever the workers are.

A session gathers the ranks, places and starts the workers (those on other ranks over MPI, those it hosts itself
over loopback), then runs one input after another through them, fetches the metrics and lets everybody go. Whatever
happens in between, `close` releases all ranks.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from coordinator.callbacks import Callbacks
from coordinator.collect import Collecting, Gathered, Rows, collect
from coordinator.engines import fitted_placements
from coordinator.handshake import Handshake
from coordinator.loop import HEARTBEAT_S, Coordinator
from coordinator.mpi_collectives import SoloCollectives
from coordinator.relays import Trunk
from coordinator.rundata import NO_COLLECTIVES
from coordinator.serve import drive, turn
from coordinator.setup import Setup, build_worker
from coordinator.source import GatedSource, Source
from coordinator.surroundings import Recorder, Surroundings
from coordinator.transport import Backoff, Loopback, Routed
from coordinator.world import Ranks
from scheduling import events as ev
from scheduling import messages as m
from scheduling.control import ControlPlane, Limits
from scheduling.errors import LlmpiError, RankLostError
from scheduling.lengths import Lengths
from scheduling.link import Endpoint, Hub, Spoke
from scheduling.placement import Plan, plan, plan_alone, unparted
from workers.worker import Worker

EPOCH = 1
LAST_S = 0.5
"""What the collectives are given at least once all ranks have come to them, however late it is."""
CLOSE_S = 10.0
"""What ranks have to take in what they were sent, or to end their engine, before they are left behind."""
FENCE_S = 5.0
"""How long the death of a rank that was killed may take to be known."""
WORK_MARGIN = 20.0
"""So many times as long as expected rank 0 may take for what it does without a word: some disks are slow."""
DEAF_S = 5.0
"""A rank that has been silent for so long may not leave when it is told to. Heartbeats come every second."""


class Session:
    """See the module's text. `world` None: this process is alone and hosts all workers itself."""

    def __init__(
        self, setup: Setup, world: Ranks | None, *, number: int = 0, around: Surroundings | None = None
    ) -> None:
        self._around = around or Surroundings()
        self._clock = self._around.clock
        self.setup = setup
        self.world = world
        self.number = number
        self.plan: Plan | None = None
        self.hosts: dict[int, m.Host] = {0: setup.host}
        self.hosted: list[Worker] = []
        self.coordinator: Coordinator | None = None
        self.log_dir: Path | None = None
        self.embeds_only = setup.config.embeddings
        """Whether engines need not be ready for generating text. To be set before `start`."""
        self.lengths: Lengths | None = None
        """How long the requests are, if that is known before the workers start."""
        self.given_plan: Plan | None = None
        """Who is to have what, where that does not follow from who is here."""
        self.gate: Callable[[Coordinator], bool] | None = None
        """Asked before requests are read, whether they may be."""
        self.beats = False
        """Whether it is driven without a pause from `start` to `collect`, so that its silence means that it is gone."""
        self._beat_at = -math.inf
        self._routes: dict[int, Endpoint] = {}
        remote = list(range(1, world.size)) if world is not None else []
        self._remote = remote
        self._trunk: Trunk | None = None
        endpoint = world.endpoint() if world is not None else None
        if world is not None and endpoint is not None and world.leaders:
            endpoint = self._trunk = Trunk(endpoint, world.leaders)
        self._endpoint = Routed(self._routes, endpoint)
        self.hub = Hub(self._endpoint, remote)
        self._pids: dict[int, int] = {}
        self._unreachable: list[int] = []
        self.welcomed_at = 0.0
        """When rank 0 welcomed the ranks, on its clock: ranks count their time from there."""
        self.engine_end_s = m.ENGINE_END_S
        """How long engines may take to end before they are killed."""

    # ------------------------------------------------------------ start

    def beat(self) -> None:
        """Tell the ranks, which may be waiting in the handshake already, that rank 0 is here. To be called often while
        it prepares."""
        if self.world is None or self._clock() < self._beat_at:
            return
        self._beat_at = self._clock() + HEARTBEAT_S
        self.hub.broadcast(m.Heartbeat())
        self.hub.flush()
        self._endpoint.unsent_bytes()  # what has left is forgotten

    def start(self, check: Callable[[], None] = lambda: None) -> list[str]:
        """Shake hands with all ranks, place and start the workers. Returns notes for people.

        `check` is called while others are waited for; what it raises ends the start.

        Raises:
            HandshakeError, ConfigError, RankLostError: the job cannot start; all ranks have been released.
        """
        setup = self.setup
        handshake = Handshake(self.hub, setup.hello(), self._clock)
        try:
            backoff = Backoff()
            while not handshake.step():
                check()
                self.beat()
                self._around.sleep([], backoff.next_s(in_flight=True))
            self.hosts.update({rank: hello.host for rank, hello in handshake.hellos.items()})
            self._pids = {rank: hello.pid for rank, hello in handshake.hellos.items()}
            self.plan = self._fit(self._place())
        except Exception as error:
            if isinstance(error, RankLostError) and not self.hub.lost:
                self._unreachable = [rank for rank in self._remote if rank not in handshake.hellos]
            self.refuse(str(error))
            raise
        self.welcomed_at = self._clock()
        for rank in self._remote:
            self.hub.send(rank, self._welcome(self.plan.placements[rank]))
        for worker in sorted(set(self.plan.placements) - set(self._remote)):
            loopback = Loopback(0, worker)
            self._routes[worker] = loopback.near
            self._endpoint.add(loopback.near)
            self.hub.add(worker)
            log = self.log_path(worker)
            self.hosted.append(
                build_worker(setup, worker, Spoke(loopback.far), log, self._clock, self._around.wall_clock)
            )
            self.hub.send(worker, self._welcome(self.plan.placements[worker]))
        self.hub.flush()
        return [*self.plan.notes, *self._leading()]

    def _leading(self) -> list[str]:
        leaders = set() if self.world is None else set(self.world.leaders.values())
        if not leaders:
            return []
        return [f"{len(leaders)} leaders carry messages between rank 0 and {len(self._remote)} workers"]

    def _place(self) -> Plan:
        config = self.setup.config
        if self.given_plan is not None:
            return self.given_plan
        if self.world is None:
            alone = plan_alone(
                self.setup.host, gpus_per_rank=config.gpus_per_rank, ranks_per_gpu=config.ranks_per_gpu,
                want_gpu=config.want_gpu,
            )  # fmt: skip
            host, taken = self.setup.host, {uuid for placement in alone for uuid in placement.gpu_uuids}
            notes = tuple(unparted(host.hostname, host.gpus, taken))
            return Plan(dict(enumerate(alone)), coordinator_works=True, notes=notes)
        return plan(
            self.hosts, rank0_works=config.coordinator_works, gpus_per_rank=config.gpus_per_rank,
            ranks_per_gpu=config.ranks_per_gpu, want_gpu=config.want_gpu,
        )  # fmt: skip

    def _fit(self, plan: Plan) -> Plan:
        """Decide what each engine is to be. Raises ConfigError if it cannot fit."""
        hosts = {worker: self.hosts.get(worker, self.setup.host) for worker in plan.placements}
        placements, said = fitted_placements(
            self.setup.config, self.setup.model, plan.placements, hosts, self.lengths, embeds_only=self.embeds_only
        )  # fmt: skip
        return replace(plan, placements=placements, notes=(*plan.notes, *said))

    def _welcome(self, placement: m.Placement) -> m.Welcome:
        if self.embeds_only:
            placement = msgspec.structs.replace(placement, lanes=("embed",))
        return m.Welcome(
            placement=placement, run_seed=self.setup.config.seed, session=self.number,
            silence_max_s=self._silence_max_s(),
        )  # fmt: skip

    def _silence_max_s(self, busy_s: float = 0.0) -> float | None:
        """How long ranks are to bear rank 0's silence, if it is busy for so long."""
        return self.setup.config.rank0_silence_max_s + busy_s if self.beats else None

    def _tell_busy(self, busy_s: float) -> None:
        """Have ranks bear a silence of so much more than usual, so that none ends the job in the middle of its end. To
        be flushed."""
        if (silence_max_s := self._silence_max_s(busy_s)) is None:
            return
        for rank in self._remote:
            self.hub.send(rank, m.Busy(silence_max_s))

    def log_path(self, worker: int) -> Path | None:
        return None if self.log_dir is None else self.log_dir / f"engine-{worker}.log"

    def names(self) -> dict[int, str]:
        """What to call each worker when speaking to people."""
        if self.plan is None:
            return {}
        where = {worker: self.hosts.get(worker, self.setup.host).hostname for worker in self.plan.placements}
        return {worker: f"rank {worker} on {host}" for worker, host in where.items()}

    # ------------------------------------------------------------ one input

    def begin(self, source: Source, record: Recorder, callbacks: Callbacks, *, earlier: int = 0) -> Coordinator:
        """A coordinator for one input over the workers of this session. Drive it with `turn` or `run`."""
        config = self.setup.config
        # Who listens to text as it is made hears one attempt from its beginning to its end.
        copies = config.makes_copies and callbacks.on_delta is None
        limits = Limits(
            prefetch=config.prefetch, lease_s=config.lease_s, deaths=config.max_deaths, copies=copies
        )  # fmt: skip
        now = self._clock()
        before = self.coordinator
        # Answers to what an earlier input left behind may still come: their numbers must not be this one's.
        first_index = 0 if before is None else before.plane.highest + 1
        first_recall = 0 if before is None else before.plane.next_recall
        plane = ControlPlane(
            self.hub.workers, config.schedule, now, limits=limits, output_limit_default=config.max_tokens,
            first_index=first_index, first_recall=first_recall,
        )  # fmt: skip
        if (gate := self.gate) is not None:
            source = GatedSource(source, lambda: gate(coordinator))
        self.coordinator = coordinator = Coordinator(
            self.hub, plane, source, record, self._clock, names=self.names(), session=self.number,
            earlier=earlier, callbacks=callbacks,
        )  # fmt: skip
        if before is not None:
            self.hub.broadcast(m.Exhausted(False))
            coordinator.take_over(before)
        return coordinator

    def turn(self) -> bool:
        """One turn of everything that rank 0 hosts. True if anything happened."""
        assert self.coordinator is not None
        return turn(self.coordinator, self.hosted)

    def wait(self, delay_s: float) -> None:
        """Sleep, or less if an engine hosted here has something to say."""
        self._around.sleep([worker.fileno() for worker in self.hosted], delay_s)

    def run(self, keep_on: Callable[[], bool] = lambda: True) -> ev.Stop | None:
        """Until there is an outcome; None if `keep_on` said no before."""
        assert self.coordinator is not None
        drive(self.coordinator, self.hosted, keep_on, self._around.sleep)
        return self.coordinator.outcome

    # ------------------------------------------------------------ end

    def collect(
        self,
        take: Callable[[Rows], None] = lambda rows: None,
        begin: Callable[[], None] = lambda: None,
        patience_s: float | None = None,
        give_up_at: Callable[[], float | None] = lambda: None,
        work_s: float = 0.0,
    ) -> Gathered | None:
        """Fetch everybody's metrics by collectives. `take` is given the rows of requests, a chunk at a time, `begin` is
        called before the first, also where they come again.

        Ranks that MPI knows to be gone are left out. None if one is silent, or MPI does not let the others go on: then
        only the record can be told of, and `leave` ends the job, because who waits for such a rank waits for ever.
        A rank is waited for half of `patience_s` at most before, and as long in each of the collectives; None: for its
        lease, and CLOSE_S. `give_up_at` says until when in all, for that may become earlier meanwhile. `work_s`: what
        rank 0 does between this and `close`, during which it says nothing, takes about so long.
        """
        self._unreachable = list(self._remote)  # until it has gone well: an error in between leaves the others in it
        wait_s = self.setup.config.lease_s + CLOSE_S if patience_s is None else patience_s / 2
        missing = self._call_together(wait_s, give_up_at)
        self._tell_busy(wait_s + WORK_MARGIN * work_s)
        if not missing:
            for rank in self._remote:
                self.hub.send(rank, m.Enter(EPOCH, bool(self.hub.lost)))
        self.hub.flush()
        if missing:
            self._unreachable = missing
            return None
        at = give_up_at()
        collectives = self._collectives(wait_s, math.inf if at is None else max(LAST_S, at - self._clock()))
        hosted = [worker.metrics for worker in self.hosted]
        try:
            gathered = collect(collectives, hosted, self._clock(), take, begin, reduced=bool(self.hub.lost))
        except RankLostError:
            return None
        self._unreachable = []
        return gathered

    def _call_together(self, wait_s: float, give_up_at: Callable[[], float | None]) -> list[int]:
        """Have all engines end and all ranks wait to enter the collectives. Returns the ranks that do not answer."""
        coordinator = self.coordinator
        assert coordinator is not None
        for rank in self._remote:
            self.hub.send(rank, m.Collect(EPOCH, self.engine_end_s))
        self.hub.flush()
        for worker in self.hosted:
            worker.close(self.engine_end_s)
        silent = coordinator.silent()

        def missing() -> list[int]:
            return [r for r in self._remote if r not in self.hub.lost and coordinator.collecting.get(r) != EPOCH]

        def through() -> bool:
            at = give_up_at()
            return not set(missing()) - silent or (at is not None and self._clock() >= at)

        self._turn_until(through, wait_s)
        if missing() and self.world is not None:
            here = [rank for rank in missing() if self.hosts[rank].hostname == self.hosts[0].hostname]
            if self.world.fence([self._pids[rank] for rank in here]):
                coordinator.note(
                    f"rank {', '.join(map(str, here))} says nothing and was killed: the others end without"
                )
                self._turn_until(lambda: not missing(), min(FENCE_S, wait_s))
        return missing()

    def _turn_until(self, holds: Callable[[], bool], patience_s: float) -> None:
        """Listen to the ranks until something holds, at most so long."""
        assert self.coordinator is not None
        deadline, backoff = self._clock() + patience_s, Backoff()
        while True:
            busy = turn(self.coordinator, self.hosted)
            if holds() or self._clock() >= deadline:
                return
            if busy:
                backoff.reset()
            else:
                self._around.sleep([], backoff.next_s(in_flight=True))

    def absent(self, gathered: Gathered | None) -> dict[int, tuple[str, str]]:
        """Workers on other ranks that did not take part in `collect`, and their hosts and devices."""
        assert self.plan is not None
        present = () if gathered is None else gathered.present
        return {
            rank: (self.hosts[rank].hostname, self.plan.placements[rank].note)
            for rank in self._remote if rank not in present and rank in self.plan.placements
        }  # fmt: skip

    def took_part(self, gathered: Gathered | None) -> str:
        """What to say of who did."""
        if gathered is None:
            return NO_COLLECTIVES
        size = 1 if self.world is None else self.world.size
        return f"{size} ranks" if len(gathered.present) == size else f"{len(gathered.present)} of {size} ranks"

    def let_go(self, work_s: float = 0.0) -> None:
        """Instead of `collect`, where time is short: ranks that have said nothing lately are not waited for. `work_s`
        as there."""
        self._tell_busy(WORK_MARGIN * work_s)
        self.hub.flush()
        if self.coordinator is not None:
            self._unreachable += sorted(self.coordinator.silent(DEAF_S).intersection(self._remote))

    def _collectives(self, patience_s: float, in_all_s: float) -> Collecting:
        return SoloCollectives() if self.world is None else self.world.collectives(patience_s, in_all_s)

    def refuse(self, reason: str) -> None:
        """Tell ranks that wait in the handshake to leave."""
        for rank in self._remote:
            self.hub.send(rank, m.Refuse(reason))
        self._flush_all()

    def close(self, reason: str = "done") -> None:
        """Release all ranks and end the engines hosted here. Never raises for a rank that is gone."""
        for rank in self._remote:
            self.hub.send(rank, m.Stop(reason, self.engine_end_s))
        self._flush_all()
        for worker in self.hosted:
            worker.close(self.engine_end_s)

    def leave(self, code: int) -> int:
        """The last word, after `close`: the exit code, or the end of the job where ranks cannot be released."""
        if self._unreachable and self.world is not None:
            error = sys.exc_info()[1]
            if isinstance(error, LlmpiError):
                print(f"llmpi: {error}", file=sys.stderr)
            elif error is not None:
                traceback.print_exc()
            if not isinstance(error, RankLostError):
                names = self.names()
                who = ", ".join(names.get(rank, f"rank {rank}") for rank in self._unreachable)
                print(f"llmpi: no answer from {who}: ending the job", file=sys.stderr)
            self.world.abort(code)
        return code

    def _flush_all(self) -> None:
        """Send the last words."""
        if self._trunk is not None:
            self._trunk.go_direct()
        self.hub.flush()
        deadline = self._clock() + min(CLOSE_S, 2 * self.engine_end_s)
        while self._endpoint.unsent_bytes() and self._clock() < deadline:
            self._around.sleep([], 1e-3)
