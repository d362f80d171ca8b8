"""What must hold: after every event of the control plane, whenever an answer is acknowledged, after every session, and
when the run is complete. What does not is a `ViolationError`.

`Books` outlive the sessions of a seed. They know what each request must come to, which lines the record has promised,
and how often engines died with a request.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import msgspec
import numpy as np

from coordinator.config import JobConfig
from scheduling.control import ControlPlane, Limits
from scheduling.ending import Mode
from scheduling.errors import BugError, PeerError, RunDirError
from scheduling.estimates import LengthEstimator
from scheduling.events import Committed, Event, Instruction, Tick
from scheduling.recordline import Row, decode_row
from storage.record import RecordWriter
from storage.recovery import scan
from storage.runstatus import Status, status
from tests.scheduling.oracle import Oracle
from tests.simulation.agenda import ViolationError
from tests.simulation.disk import Outside, SimulatedDisk, Storage
from tests.simulation.engines import Deaths
from tests.simulation.work import Expected, Work


class _Choice(msgspec.Struct):
    text: str


class _Body(msgspec.Struct):
    choices: list[_Choice]


class _Response(msgspec.Struct):
    body: _Body


class _Answer(msgspec.Struct):
    response: _Response | None


_decode_answer = msgspec.json.Decoder(_Answer).decode


class Books:
    """See the module's text."""

    def __init__(self, work: Work, storage: Storage, run_dir: Path, config: JobConfig) -> None:
        self.work = work
        self.config = config
        self.run_dir = run_dir
        self.record = run_dir / "results.jsonl"
        self.deaths: dict[int, Deaths] = {}
        """By session, as run.json counts them."""
        self.promised: list[bytes] = []
        self._appended: list[bytes] = []
        self._storage = storage
        self._disk = SimulatedDisk(storage, Outside())
        self._judged: set[bytes] = set()

    # ------------------------------------------------------------ the record while it is written

    def record_opened(self) -> None:
        self._appended.clear()

    def append(self, lines: Sequence[bytes]) -> None:
        self._appended += lines

    def acknowledge(self, count: int) -> None:
        """The record says that so many more lines are durable."""
        if count > len(self._appended):
            raise ViolationError(f"{count} lines are acknowledged, {len(self._appended)} were appended")
        lines, self._appended = self._appended[:count], self._appended[count:]
        if count and b"".join(lines) not in self._storage.durable(self.record):
            raise ViolationError("answers were acknowledged that are not on the disk")
        self.promised += lines

    # ------------------------------------------------------------ between sessions

    def judge_between(self) -> Status | None:
        """When nobody works on the run: every promise is kept, and `llmpi status` tells the truth."""
        content = self._storage.content(self.record)
        there = Counter(content.splitlines(keepends=True))
        for line in self.promised:
            if there[line] != 1:
                raise ViolationError(f"an acknowledged answer is there {there[line]} times: {line[:80]!r}")
        try:
            found = scan(self._disk, self.record)
            told = status(self.run_dir, self._disk)
        except RunDirError as error:
            if self._storage.content(self.run_dir / "run.json") or self.promised:
                raise ViolationError(f"the run directory cannot be read: {error}") from error
            return None
        for line in content[: found.durable_bytes].splitlines():
            if line not in self._judged:
                self._judge_line(line)
                self._judged.add(line)
        if told.complete and told.done != len(self.work.expected):
            raise ViolationError(f"the run says that it is complete with {told.done} of its requests done")
        return told

    def _judge_line(self, line: bytes) -> None:
        row = decode_row(line)
        index = row.llmpi.index
        if not 0 <= index < len(self.work.expected):
            raise ViolationError(f"request {index} is recorded and was never asked")
        if row.custom_id != f"r{index}":
            raise ViolationError(f"request {index} is recorded as {row.custom_id}")
        expected = self.work.expected[index]
        if row.error is not None:
            self._judge_failure(row, expected)
            return
        response = _decode_answer(line).response
        text = "" if response is None else response.body.choices[0].text
        if (text, row.llmpi.output_tokens) != (expected.text, expected.tokens):
            raise ViolationError(
                f"request {index} is answered with {text!r}, {row.llmpi.output_tokens} tokens; "
                f"an undisturbed run says {expected.text!r}, {expected.tokens} tokens"
            )

    def _judge_failure(self, row: Row, expected: Expected) -> None:
        index, session = row.llmpi.index, row.llmpi.session
        assert row.error is not None
        code = row.error.code
        if code == "engine_died":
            deaths = self.deaths[session].counts[index] if session in self.deaths else 0
            if deaths < self.config.max_deaths:
                raise ViolationError(f"request {index} is given up after {deaths} deaths of engines that ran it")
        elif code not in expected.codes and not (code == "timeout" and self.config.request_timeout_s is not None):
            raise ViolationError(f"request {index} has failed ({code}: {row.error.message}); it was to be answered")

    # ------------------------------------------------------------ the end

    def judge_complete(self, told: Status, dropped: int) -> None:
        """Each request exactly once, and metrics.h5 says what the record says.

        `dropped`: answers that rank 0 did not want in the last session, whether or not they came.
        """
        rows = [decode_row(line) for line in self._storage.content(self.record).splitlines()]
        if sorted(row.llmpi.index for row in rows) != list(range(len(self.work.expected))):
            raise ViolationError("the run is complete, and its record does not hold each request once")
        if told.failed != sum(row.error is not None for row in rows):
            raise ViolationError(f"the run says that {told.failed} requests failed")
        with h5py.File(io.BytesIO(self._storage.content(self.run_dir / "metrics.h5")), "r") as file:
            table, ranks, attributes = file["requests"][:], file["ranks"][:], dict(file.attrs)
        if "sums_differ" in attributes:
            raise ViolationError(f"what the ranks counted differs from the record: {attributes['sums_differ']}")
        self._judge_table(table, rows)
        took_part = str(attributes["collectives"])
        if took_part.endswith(" ranks") and " of " not in took_part:
            self._judge_counters(ranks[ranks["session"] == attributes["session"]], attributes, rows, dropped)

    @staticmethod
    def _judge_counters(ranks: Any, attributes: dict[str, Any], rows: list[Row], dropped: int) -> None:
        """What the ranks of the last session counted is what they have in the record, and what was not wanted."""
        recorded = sum(row.llmpi.session == attributes["session"] and row.llmpi.end_s is not None for row in rows)
        counted, late = int(ranks["requests"].sum()), int(attributes["late_answers_dropped"])
        if not recorded + late <= counted <= recorded + dropped:
            raise ViolationError(
                f"the ranks counted {counted} requests; {recorded} are recorded, {late} came late, {dropped} dropped"
            )

    @staticmethod
    def _judge_table(table: Any, rows: list[Row]) -> None:
        for name in ("index", "attempt", "rank", "session", "prompt_tokens", "output_tokens"):
            if not np.array_equal(table[name], [getattr(row.llmpi, name) for row in rows]):
                raise ViolationError(f"metrics.h5 and the record differ in {name}")
        if table["ok"].tolist() != [int(row.error is None) for row in rows]:
            raise ViolationError("metrics.h5 and the record differ in what failed")


class WatchedWriter(RecordWriter):
    """The record's writer, beside which books are kept."""

    books: Books

    def append(self, lines: Sequence[bytes]) -> None:
        super().append(lines)
        self.books.append(lines)

    def acknowledged(self) -> int:
        count = super().acknowledged()
        self.books.acknowledge(count)
        return count


class _Bare:
    """The plane as it is without anybody who watches it."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def handle(self, event: Event, now: float) -> list[Instruction]:
        return ControlPlane.handle(self._plane, event, now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plane, name)


class _PlaneOracle(Oracle):
    def __init__(
        self, plane: ControlPlane, workers: list[int], schedule: str, limits: Limits, output_limit: int, now: float
    ) -> None:
        super().__init__(workers, schedule, limits)
        self.estimator = LengthEstimator(output_limit)
        self.plane = _Bare(plane)  # type: ignore[assignment]
        for known in self.workers.values():
            known.heard = now


class Watched(Protocol):
    """What an oracle wants to know of the session. `asked_to_stop`: somebody has asked, and the loop runs."""

    books: Books
    asked_to_stop: bool

    def note(self, *what: object) -> None: ...

    def must_be_heard(self, rank: int) -> bool:
        """Whether a rank lives, and nothing has kept its messages back for longer than its lease."""


class WatchedPlane(ControlPlane):
    """The control plane, with the oracle of tests.scheduling beside it."""

    def __init__(self, watched: Watched, workers: Any, schedule: str, now: float, **options: Any) -> None:
        super().__init__(workers, schedule, now, **options)
        self._watched = watched
        self._before = len(watched.books.promised)
        self._durable = 0
        self._oracle = _PlaneOracle(
            self, list(workers), schedule, options["limits"], options["output_limit_default"], now
        )  # fmt: skip
        self._ticks_asked = 0
        watched.asked_to_stop = False

    def handle(self, event: Event, now: float) -> list[Instruction]:
        self._watched.note(type(event).__name__, *_facts(event))
        silent = self._silent() if isinstance(event, Tick) else set()
        if isinstance(event, Committed):
            self._durable += event.count
            if self._durable > len(self._watched.books.promised) - self._before:
                raise ViolationError("the control plane is told of more durable answers than the record has promised")
        try:
            out = self._oracle.handle(event, now)
        except (AssertionError, BugError, PeerError) as error:
            raise ViolationError(f"{type(event).__name__}: {type(error).__name__}: {error}") from error
        for instruction in out:
            self._watched.note("->", type(instruction).__name__, *_facts(instruction))
        if isinstance(event, Tick):
            self._judge_tick(silent)
        return out

    def _silent(self) -> set[int]:
        return {view.id for view in self.workers() if view.silent}

    def _judge_tick(self, silent_before: set[int]) -> None:
        for rank in self._silent() - silent_before:
            if self._watched.must_be_heard(rank):
                raise ViolationError(f"rank {rank} is taken for lost; it lives and nothing holds its messages up")
        if self._watched.asked_to_stop and self.mode is Mode.OPEN:
            self._ticks_asked += 1
            if self._ticks_asked > 1:
                raise ViolationError("the job was asked to stop, and does not drain")


def _facts(what: Any) -> list[object]:
    """What tells one event or instruction from another, as numbers and short texts."""
    facts: list[object] = []
    for name in what.__dataclass_fields__:
        value = getattr(what, name)
        if isinstance(value, list):
            facts.append(
                [one if isinstance(one, tuple | int) else (one.index, getattr(one, "attempt", 1)) for one in value]
            )
        elif not isinstance(value, dict):
            facts.append(value)
    return facts
