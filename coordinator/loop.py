"""Rank 0's loop: messages, input and record on one side, the control plane on the other.

`Coordinator.step()` does one turn and never waits: take what has arrived, tell the control plane, carry out what it
instructs, read as much input as it wants, acknowledge what the record has made durable. The text of requests in flight
is kept here, by index; the control plane only knows numbers. Link, record, source and clock come as arguments.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from coordinator.callbacks import Callbacks, Snapshot
from coordinator.source import Source
from coordinator.surroundings import Recorder
from scheduling import events as ev
from scheduling import messages as m
from scheduling.control import ControlPlane
from scheduling.ending import Mode
from scheduling.errors import EngineError, LlmpiError, UserError
from scheduling.ledger import WorkerState
from scheduling.link import Hub
from scheduling.recordline import encode_failure

TICK_S = 0.25
OVERSLEPT_S = 1.0
HEARTBEAT_S = 2.0
"""How often rank 0 says to all workers that it is here."""
READ_BYTES_MAX = 64 << 20
PAYLOAD_BYTES_MAX = 256 << 20
BACKLOG_BYTES_MAX = 256 << 20
ASSIGN_BYTES_MAX = 8 << 20


class Coordinator:
    """See the module's text. `outcome` is set once nothing is left to do."""

    def __init__(
        self,
        hub: Hub,
        plane: ControlPlane,
        source: Source,
        record: Recorder,
        clock: Callable[[], float],
        *,
        names: dict[int, str],
        session: int,
        earlier: int = 0,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.plane = plane
        self.outcome: ev.Stop | None = None
        self.failures: list[tuple[int, int, str, str]] = []
        self.dropped: set[tuple[int, int, int]] = set()
        self.ready: dict[int, m.Ready] = {}
        self._mistaken: set[int] = set()
        """Workers whose engines cannot be loaded because of what the user gave."""
        self.first_assigned_at: float | None = None
        self.collecting: dict[int, int] = {}
        """Workers that wait to enter the collectives, and of which epoch."""
        self._hub = hub
        self._source = source
        self._record = record
        self._clock = clock
        self._names = names
        self._session = session
        self._earlier = earlier
        self._callbacks = callbacks or Callbacks()
        self._payloads: dict[int, tuple[bytes, str]] = {}
        self._payload_bytes = 0
        self._made_tokens = 0
        self._input_open = True
        self._generations: dict[int, int] = {}
        self._unacknowledged: deque[bytes] = deque()
        self._born = self._tick_at = self._beat_at = clock()
        self._heard = dict.fromkeys(hub.workers, self._born)
        self._forgave_at = -math.inf
        self._silent: set[int] = set()
        self._rejoins: dict[int, int] = {}
        """The last number that each worker was told to rejoin with: it says that with every `Ready` from then on."""
        self._returning: set[int] = set()
        self._next_rejoin = 0

    # ------------------------------------------------------------ one turn

    def step(self) -> bool:
        """One turn. True if anything happened.

        Raises:
            UserError, EngineError: no engine could be started, for each rank's reason.
            RecordError: the record cannot be written. What was acknowledged is safe.
            ProtocolError: a worker broke the protocol.
        """
        busy = False
        for worker, message in self._hub.poll():
            busy = busy or not isinstance(message, m.Heartbeat)
            self._heard[worker] = self._clock()
            self._handle(worker, message)
        for worker in self._hub.take_lost():
            busy = True
            self._on_lost(worker)
        busy = self._acknowledge() or busy
        busy = self._read() or busy
        self._tick()
        self._hub.flush()
        return busy

    def take_over(self, before: Coordinator) -> None:
        """Go on with the workers of a coordinator whose input is through. What it left behind is cancelled."""
        left = list(before._payloads)
        self._heard, self._silent = before._heard, before._silent
        self._rejoins, self._next_rejoin = before._rejoins, before._next_rejoin
        self._returning = before._returning
        for worker, ready in before.ready.items():
            self.ready[worker] = ready
            self._generations[worker] = ready.generation
            if left:
                self._hub.send(worker, m.Cancel(left))
        for view in before.plane.workers():
            if view.state is WorkerState.READY:
                self._tell(ev.WorkerReady(view.id, view.slots))
            elif view.state is WorkerState.GONE:
                self._tell(ev.WorkerLost(view.id, view.reason))

    @property
    def in_flight(self) -> bool:
        return bool(self._payloads)

    def silent(self, after_s: float | None = None) -> set[int]:
        """Workers that have said nothing for so long (None: their lease), and that MPI does not know to be gone."""
        after_s, now = self.plane.limits.lease_s if after_s is None else after_s, self._clock()
        if after_s is None:
            return set()
        return {worker for worker, at in self._heard.items() if now - at > after_s} - self._hub.lost

    def snapshot(self) -> Snapshot:
        now = self._clock()
        totals, views = self.plane.totals, self.plane.workers()
        running = self.plane.running
        since = self._born if self.first_assigned_at is None else self.first_assigned_at
        return Snapshot(
            elapsed_s=now - since, total=self._source.total, earlier=self._earlier, done=totals.done,
            failed=totals.failed, running=running, queued=len(self._payloads) - running,
            output_tokens=totals.output_tokens, prompt_tokens=totals.prompt_tokens,
            made_tokens=max(self._made_tokens, totals.output_tokens), draining=self.plane.mode is Mode.DRAINING,
            workers_ready=sum(view.slots > 0 for view in views), workers=len(views),
        )  # fmt: skip

    # ------------------------------------------------------------ in

    def _handle(self, worker: int, message: m.FromWorker) -> None:
        if worker in self._silent:
            self._on_return(worker)
        match message:
            case m.Report():
                self._made_tokens += message.made_tokens
                self._tell(ev.Reported(worker, message.started, message.finished, message.deltas, message.made_tokens))
            case m.Heartbeat():
                self._tell(ev.Heard(worker))
            case m.Counters():
                self._tell(ev.Heard(worker))
                if self._callbacks.on_counters is not None:
                    self._callbacks.on_counters(worker, message)
            case m.Recalled():
                self._tell(ev.RecallConfirmed(worker, message.recall, message.indexes))
            case m.Collecting():
                self.collecting[worker] = message.epoch
                self._tell(ev.Heard(worker))
            case m.Ready():
                self._on_ready(worker, message)
            case m.EngineDown():
                self._on_engine_down(worker, message)
            case m.Crashed():
                self.note(f"{self._names[worker]}: {message.reason}\n{message.traceback}".rstrip())
                self._tell(ev.WorkerLost(worker, message.reason))
            case m.Hello():
                pass  # of a worker that rank 0 hosts itself: it needs no handshake

    def _on_ready(self, worker: int, ready: m.Ready) -> None:
        if ready.rejoin != self._rejoins.get(worker, 0):
            return  # said before it heard that it is to begin anew: then it says it again
        if worker in self._returning:
            self._returning.discard(worker)
            self.note(f"{self._names[worker]}: takes work again")
        self._generations[worker] = ready.generation
        self.ready[worker] = ready
        self._tell(ev.WorkerReady(worker, ready.slots))

    def _on_lost(self, worker: int) -> None:
        what = "; its work goes to the others" if self.outcome is None else ""
        self.note(f"{self._names[worker]}: its process has died{what}")
        self._tell(ev.WorkerLost(worker, "its process has died"))

    def _on_return(self, worker: int) -> None:
        """It was silent for its lease, and is not gone. What it held is others' by now: it is to begin anew."""
        self._silent.discard(worker)
        if self.outcome is not None:
            return  # it is asked for nothing any more
        self._tell(ev.WorkerReturned(worker))
        self._next_rejoin += 1
        self._rejoins[worker] = self._next_rejoin
        self._returning.add(worker)
        self._hub.send(worker, m.Rejoin(self._next_rejoin))

    def _on_engine_down(self, worker: int, down: m.EngineDown) -> None:
        name = self._names[worker]
        if not down.restarting and worker not in self.ready:
            if down.user_error:
                self._mistaken.add(worker)
            self._stop_without_engines(worker, down.reason)
        what = "starting a new one" if down.restarting else "this worker takes no more work"
        self.note(f"{name}: its engine was lost ({down.reason}); {what}")
        self._tell(ev.EngineLost(worker, down.reason, down.started, down.unstarted, down.restarting))

    def _stop_without_engines(self, worker: int, reason: str) -> None:
        """If no engine has loaded, and with `worker` the last one that could is gone, there is nothing to go on with.

        One that cannot load is its rank's trouble as long as another may: what is wrong with what the user gave (the
        model, say) is wrong everywhere, and told at about the same time.
        """
        gone = {view.id: view.reason for view in self.plane.workers() if view.state is WorkerState.GONE}
        gone[worker] = reason
        if self.ready or len(gone) < len(self._names):
            return
        who: dict[str, list[str]] = {}
        for rank, why in sorted(gone.items()):
            who.setdefault(why, []).append(self._names[rank])
        error = UserError if self._mistaken >= gone.keys() else EngineError
        raise error("; ".join(f"{', '.join(names)}: {why}" for why, names in who.items()))

    def _read(self) -> bool:
        if not self._input_open:
            return False
        wanted = self.plane.wanted()
        if wanted == 0 or self._payload_bytes > PAYLOAD_BYTES_MAX or self._record.backlog_bytes > BACKLOG_BYTES_MAX:
            return False
        arrivals = self._source.read(wanted, READ_BYTES_MAX)
        fresh: list[ev.NewRequest] = []
        for arrival in arrivals:
            self._payloads[arrival.index] = (arrival.line, arrival.custom_id)
            self._payload_bytes += len(arrival.line)
            if arrival.error is None:
                fresh.append(ev.NewRequest(arrival.index, arrival.prompt_tokens_estimate, arrival.max_tokens))
                continue
            self._arrive(fresh)
            fresh = []
            self._tell(ev.RequestRejected(arrival.index, str(arrival.error)))
        self._arrive(fresh)
        if self._source.ended:
            self._input_open = False
            self._tell(ev.InputEnded())
        return bool(arrivals)

    def _arrive(self, fresh: list[ev.NewRequest]) -> None:
        if fresh:
            self._tell(ev.RequestsArrived(fresh))

    def _acknowledge(self) -> bool:
        count = self._record.acknowledged()
        if not count:
            return False
        if self._callbacks.on_result is not None:
            for _ in range(count):
                self._callbacks.on_result(self._unacknowledged.popleft())
        self._tell(ev.Committed(count))
        return True

    def _tick(self) -> None:
        now = self._clock()
        if now < self._tick_at:
            return
        stops = [] if self._callbacks.stops is None else self._callbacks.stops()
        now = self._clock()  # who was asked may have looked at a disk that hangs
        if now - self._tick_at > OVERSLEPT_S and self._forgives(now):
            # Rank 0 itself was stopped, or its caller took long: what the workers said meanwhile is still unread.
            for worker in self._hub.workers:
                self._heard[worker] = now
                self._tell(ev.Heard(worker))
        self._tick_at = now + TICK_S
        for stop in stops:
            self._tell(stop)
        self._tell(ev.Tick())
        self._look_for_silent()
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_S
            self._hub.broadcast(m.Heartbeat())
        if self._callbacks.on_tick is not None:
            self._callbacks.on_tick(self.snapshot())

    def _forgives(self, now: float) -> bool:
        """Whether silence may be rank 0's own fault. Short delays are a reason once in two leases: who always comes a
        little late would find nobody silent."""
        lease_s = self.plane.limits.lease_s
        if lease_s is not None and now - self._tick_at < lease_s / 2 and now - self._forgave_at <= 2 * lease_s:
            return False
        self._forgave_at = now
        return True

    def _look_for_silent(self) -> None:
        """Say which workers a tick has lost."""
        for view in self.plane.workers():
            if view.silent and view.id not in self._silent:
                self._silent.add(view.id)
                self.note(f"{self._names[view.id]}: {view.reason}; its work goes to the others")

    # ------------------------------------------------------------ out

    def _tell(self, event: ev.Event) -> None:
        for instruction in self.plane.handle(event, self._clock()):
            self._carry_out(instruction)

    def _carry_out(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.Assign():
                self._assign(instruction)
            case ev.Record():
                lines = []
                for answer in instruction.finished:
                    lines.append(answer.line)
                    self._payload_bytes -= len(self._payloads.pop(answer.index)[0])
                self._append(lines)
            case ev.Drop():
                # The worker's own rows hold these, the record does not: left out when rows are gathered.
                self.dropped.update((instruction.worker, index, attempt) for index, attempt in instruction.answers)
            case ev.Cancel():
                # Its rows may hold the answers before the reports do: they are left out whether or not those come.
                self.dropped.update((instruction.worker, index, attempt) for index, attempt in instruction.items)
                self._hub.send(instruction.worker, m.Cancel([index for index, _ in instruction.items]))
            case ev.GiveUp():
                self._give_up(instruction)
            case ev.Recall():
                self._hub.send(instruction.worker, m.Recall(instruction.recall, instruction.indexes))
            case ev.Fail():
                line, custom_id = self._payloads.pop(instruction.index)
                self._payload_bytes -= len(line)
                self.failures.append((instruction.index, instruction.attempt, instruction.code, instruction.reason))
                self._append(
                    [
                        encode_failure(
                            custom_id, instruction.index, instruction.attempt, 0, self._session, instruction.code,
                            instruction.reason,
                        )
                    ]
                )  # fmt: skip
            case ev.Stream():
                if self._callbacks.on_delta is not None:
                    for delta in instruction.deltas:
                        self._callbacks.on_delta(delta)
            case ev.Exhausted():
                self._hub.broadcast(m.Exhausted(instruction.empty))
            case ev.Stop():
                self.outcome = instruction

    def _append(self, lines: list[bytes]) -> None:
        self._record.append(lines)
        if self._callbacks.on_result is not None:
            self._unacknowledged.extend(lines)

    def _assign(self, instruction: ev.Assign) -> None:
        if self.first_assigned_at is None:
            self.first_assigned_at = self._clock()
        generation = self._generations[instruction.worker]
        items: list[m.WorkItem] = []
        size = 0
        for index, attempt in instruction.items:
            line = self._payloads[index][0]
            items.append(m.WorkItem(index, attempt, line, instruction.stolen.get(index)))
            size += len(line)
            if size > ASSIGN_BYTES_MAX:
                self._hub.send(instruction.worker, m.Assign(generation, items))
                items, size = [], 0
        if items:
            self._hub.send(instruction.worker, m.Assign(generation, items))

    def _give_up(self, instruction: ev.GiveUp) -> None:
        for index, attempt in instruction.items:
            line, _ = self._payloads.pop(index, (b"", ""))  # gone already, if it ran twice
            self._payload_bytes -= len(line)
            if instruction.worker is not None:
                # Its worker may end it in spite of that, after rank 0 has stopped listening.
                self.dropped.add((instruction.worker, index, attempt))

    def note(self, text: str) -> None:
        """Say it to people, if anyone listens."""
        if self._callbacks.on_note is not None:
            self._callbacks.on_note(text)


def outcome_error(outcome: ev.Stop) -> LlmpiError | None:
    """The error that an outcome stands for, if it is one."""
    if outcome.outcome == "no workers":
        return EngineError(f"no worker is left: {outcome.reason}; the run can be resumed with the same command")
    return None
