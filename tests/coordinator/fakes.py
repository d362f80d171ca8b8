"""What stands around rank 0 and around a worker, as books only: clock, network, engine, record, source, collectives.

`FakeTransport` is a whole network in one process: everything posted waits in order until a test delivers it. Fakes
for messages have `take()`, which gives what came since the last call, and `assert_empty()`. Nothing here sleeps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.collect import Blocks
from coordinator.source import Arrival
from scheduling import messages as m
from scheduling.errors import RankLostError, RequestError
from scheduling.estimates import estimate_tokens
from scheduling.recordline import encode_failure
from scheduling.requestlines import text_line
from workers.protocol import Answer, Choice, EngineLoaded, Frame, FromEngine, Job

M = TypeVar("M")


class FakeClock:
    """Time that passes only when told to."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


# ---------------------------------------------------------------- network


class FakeEndpoint:
    """A `scheduling.link.Endpoint`: what is posted is kept, what a test puts into `inbox` arrives."""

    def __init__(self) -> None:
        self.posted: list[tuple[int, bytes]] = []
        self.inbox: list[tuple[int, bytes]] = []
        self.gone: set[int] = set()

    def post(self, address: int, payload: bytes) -> None:
        self.posted.append((address, payload))

    def flush(self) -> None:
        """Nothing is kept back."""

    def receive(self) -> list[tuple[int, bytes]]:
        arrived, self.inbox = self.inbox, []
        return arrived

    def unsent_bytes(self) -> int:
        return 0

    def lost(self) -> set[int]:
        return self.gone

    def take(self) -> list[tuple[int, bytes]]:
        posted, self.posted = self.posted, []
        return posted

    def assert_empty(self) -> None:
        assert not self.posted, self.posted
        assert not self.inbox, self.inbox


class FakeTransport:
    """Endpoints that reach each other. `deliver` moves what waits; until then it is under way."""

    def __init__(self, *addresses: int) -> None:
        self.endpoints = {address: FakeEndpoint() for address in addresses}

    def __getitem__(self, address: int) -> FakeEndpoint:
        return self.endpoints[address]

    def deliver(self) -> int:
        """Everything posted arrives; returns how many envelopes that were."""
        count = 0
        for sender, endpoint in self.endpoints.items():
            for address, payload in endpoint.take():
                self.endpoints[address].inbox.append((sender, payload))
                count += 1
        return count

    def assert_empty(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.assert_empty()


class Said:
    """The other end of a link, for a test: reads the envelopes posted to it, writes its own."""

    def __init__(self, endpoint: FakeEndpoint, address: int, kind: Any) -> None:
        self._endpoint = endpoint
        self._address = address
        self._decode = msgspec.msgpack.Decoder(tuple[int, int, list[kind]]).decode
        self._sent = 0
        self._read: list[Any] = []

    def say(self, *messages: Any) -> None:
        """One envelope to whoever is under test."""
        self._sent += 1
        self._endpoint.inbox.append(
            (self._address, msgspec.msgpack.encode((m.PROTOCOL_VERSION, self._sent, list(messages))))
        )

    def take(self) -> list[Any]:
        """All messages that were sent to us since the last call."""
        mine = [payload for address, payload in self._endpoint.posted if address == self._address]
        self._endpoint.posted = [entry for entry in self._endpoint.posted if entry[0] != self._address]
        return [message for payload in mine for message in self._decode(payload)[2]]

    def take_one(self, kind: type[M]) -> M:
        [message] = self.take()
        assert isinstance(message, kind), message
        return message

    def assert_empty(self) -> None:
        assert not (left := self.take()), left


def fake_rank0(endpoint: FakeEndpoint, address: int = 0) -> Said:
    """Rank 0, as a worker under test sees it."""
    return Said(endpoint, address, m.FromCoordinator | m.FromWorker)


def fake_rank(endpoint: FakeEndpoint, address: int) -> Said:
    """A worker rank, as rank 0 under test sees it."""
    return Said(endpoint, address, m.FromCoordinator | m.FromWorker)


def hello(hostname: str = "node1", **changes: Any) -> m.Hello:
    fields: dict[str, Any] = {
        "protocol": m.PROTOCOL_VERSION, "versions": {"llmpi": "1.0", "numpy": "2.0"}, "config_digest": "c0",
        "model_fingerprint": "f0", "host": m.Host(hostname=hostname), "pid": 1,
    }  # fmt: skip
    return m.Hello(**(fields | changes))


# ---------------------------------------------------------------- engine


def loaded(slots: int = 2) -> EngineLoaded:
    return EngineLoaded(
        load_s=0.5, vocab_tokens=64, train_ctx_tokens=128, slots=slots, model_desc="fake", model_bytes=1,
        backend="FAKE", chat_template=False,
    )  # fmt: skip


def answer(key: int, text: str = "hi", *, tokens: int = 3, error: str | None = None) -> Answer:
    choices = [] if error is not None else [Choice(text, "stop", tokens)]
    return Answer(key, choices, 5, 0 if error is not None else tokens, 0.1, 0.2, 0.6, error)


class FakeEngine:
    """A `workers.port.Engine` that a test speaks for: `say` what it says, `die` when it should."""

    def __init__(self, *said: FromEngine) -> None:
        self.said: list[FromEngine] = list(said)
        self.last_words: list[FromEngine] = []
        """What only a poll after `close` brings."""
        self.jobs: list[Job] = []
        self.recalls: list[tuple[int, list[int]]] = []
        self.cancelled: list[int] = []
        self.closed = 0
        self.close_s = 0.0
        self.reason = ""

    def say(self, *frames: FromEngine) -> None:
        self.said.extend(frames)

    def die(self, reason: str = "it was killed by signal 9") -> None:
        self.reason = reason

    def start(self, *keys: int) -> None:
        self.say(Frame(started=list(keys)))

    def finish(self, *keys: int) -> None:
        self.say(Frame(finished=[answer(key) for key in keys]))

    def take(self) -> list[int]:
        """Keys of the jobs submitted since the last call."""
        jobs, self.jobs = self.jobs, []
        return [job.key for job in jobs]

    def submit(self, jobs: list[Job]) -> None:
        self.jobs.extend(jobs)

    def recall(self, recall_id: int, keys: list[int]) -> None:
        self.recalls.append((recall_id, keys))

    def cancel(self, keys: list[int]) -> None:
        self.cancelled.extend(keys)

    def poll(self) -> list[FromEngine]:
        said, self.said = self.said, []
        if self.closed:
            said, self.last_words = said + self.last_words, []
        return said

    def fileno(self) -> int | None:
        return None

    @property
    def alive(self) -> bool:
        return not self.reason

    @property
    def pid(self) -> int | None:
        return 4711

    def exit_reason(self) -> str:
        return self.reason

    def close(self, timeout_s: float) -> None:
        self.closed += 1
        self.close_s = timeout_s


# ---------------------------------------------------------------- record and source


class FakeRecord:
    """A `coordinator.loop.Recorder`. What is appended becomes durable when a test says `commit`."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.waiting = 0
        self.backlog_bytes = 0
        self._fresh = 0

    def append(self, lines: list[bytes]) -> None:
        self.lines.extend(lines)
        self.waiting += len(lines)

    def commit(self, count: int | None = None) -> None:
        count = self.waiting if count is None else count
        assert count <= self.waiting
        self.waiting -= count
        self._fresh += count

    def acknowledged(self) -> int:
        fresh, self._fresh = self._fresh, 0
        return fresh

    def take(self) -> list[bytes]:
        lines, self.lines = self.lines, []
        return lines

    def assert_empty(self) -> None:
        assert not self.lines, self.lines


class FakeSource:
    """A `coordinator.source.Source` of texts; an exception in the list is a line that cannot be run."""

    def __init__(self, prompts: Sequence[str | RequestError], first_index: int = 0) -> None:
        self._left = deque(enumerate(prompts, first_index))
        self._total = len(prompts)
        self.asked: list[int] = []
        self.closed = False

    @property
    def ended(self) -> bool:
        return not self._left

    @property
    def total(self) -> int | None:
        return self._total

    @property
    def left(self) -> int:
        return len(self._left)

    def skip(self, done: npt.NDArray[np.bool_]) -> None:
        self._left = deque(entry for entry in self._left if entry[0] >= len(done) or not done[entry[0]])

    def read(self, max_requests: int, max_bytes: int) -> list[Arrival]:
        self.asked.append(max_requests)
        taken = [self._left.popleft() for _ in range(min(max_requests, len(self._left)))]
        return [self._arrival(index, prompt) for index, prompt in taken]

    def _arrival(self, index: int, prompt: str | RequestError) -> Arrival:
        name = f"id-{index}"
        error = prompt if isinstance(prompt, RequestError) else None
        line = b"no request" if isinstance(prompt, RequestError) else text_line(prompt, name)
        return Arrival(
            index=index, line=line, custom_id=name, prompt_tokens_estimate=estimate_tokens(line), error=error
        )

    def fetch(self, index: int) -> bytes | None:
        return None

    def identity(self) -> dict[str, int | str]:
        return {"format": "fake"}

    def close(self) -> None:
        self.closed = True


def finished(index: int, attempt: int = 1, ok: bool = True, tokens: int = 3, rank: int = 1) -> m.Finished:
    line = encode_failure(f"id-{index}", index, attempt, rank, 0, "test", "a line of a test")
    return m.Finished(index, attempt, ok, 5, tokens if ok else 0, line)


# ---------------------------------------------------------------- collectives

Rows = npt.NDArray[Any]
Operation = Callable[[list[Rows]], Rows]


class FakeCollectives:
    """One rank's `coordinator.collect.Collecting`; `turn` says with what the other ranks take part, call by call."""

    def __init__(self, others: list[list[Rows]], rank: int = 0, chunk_rows: int = 2) -> None:
        self.rank = rank
        self.size = len(others) + 1
        self.ranks: tuple[int, ...] = tuple(range(self.size))
        self.calls: list[str] = []
        self._others = [deque(arrays) for arrays in others]
        self._chunk_rows = chunk_rows

    def _reduce(self, name: str, values: Rows, operation: Operation) -> Rows:
        self.calls.append(name)
        return operation([values, *(arrays.popleft() for arrays in self._others)])

    def sum(self, values: Rows) -> Rows:
        return self._reduce("sum", values, lambda parts: np.sum(parts, axis=0))

    def minimum(self, values: Rows) -> Rows:
        return self._reduce("minimum", values, lambda parts: np.min(parts, axis=0))

    def maximum(self, values: Rows) -> Rows:
        return self._reduce("maximum", values, lambda parts: np.max(parts, axis=0))

    def gather_rows(self, rows: Rows | Blocks, take: Callable[[Rows], None]) -> None:
        together = self._reduce(f"gather {len(rows)}", rows[:], np.concatenate)
        for start in range(0, len(together), self._chunk_rows):
            take(together[start : start + self._chunk_rows])

    def agree(self, well: bool) -> bool:
        return well

    def shrink(self) -> None:
        raise RankLostError("a rank is gone")


class Contribution:
    """The collectives of one rank that only notes what it contributes: the `others` of `FakeCollectives`."""

    rank = 1
    size = 2
    ranks = (0, 1)

    def __init__(self) -> None:
        self.given: list[Rows] = []
        self.shrunk = 0

    def agree(self, well: bool) -> bool:
        return well

    def shrink(self) -> None:
        self.shrunk += 1

    def sum(self, values: Rows) -> Rows:
        self.given.append(values)
        return values

    minimum = maximum = sum

    def gather_rows(self, rows: Rows | Blocks, take: Callable[[Rows], None]) -> None:
        self.given.append(rows[:])
