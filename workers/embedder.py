"""One context's loop for embeddings: take inputs, put as many as fit into a batch, run it, hand out the vectors.

An input is read in one pass and needs nothing of another batch, so there are no slots: a batch is whatever waits, in
order of arrival, up to so many tokens. Inputs of any lengths share a pass and nothing is padded, so they are not
sorted. Each attends to its own tokens only, but llama.cpp computes a part of what it masks: that is why a batch is not
as large as it could be. An input that is longer than a batch goes alone.

It drives an `Encoder` (`workers.llama_contexts.LlamaEncoder`, or a fake) and never sees llama.cpp itself. One thread
owns an embedder; backlog, meter and outbox have locks of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from scheduling.errors import EngineError
from scheduling.vectors import Vectors
from workers.backlog import CANCELLED, Backlog
from workers.meter import Meter
from workers.protocol import Answer, Choice, Frame
from workers.seating import failed
from workers.task import Task

Ints = npt.NDArray[np.int32]

ERRORS_IN_A_ROW_MAX = 3
TAKEN_AT_ONCE = 16
"""Inputs taken off the backlog before their tokens are counted: what is taken cannot be given back."""
_NO_GAPS = np.empty(0)


class Encoder(Protocol):
    """What an embedder needs of a context. See `workers.llama_contexts.LlamaEncoder`."""

    batch_tokens: int
    sequences: int
    token: Ints
    pos: Ints
    seq: Ints

    def encode(self, rows: int) -> int: ...

    def vectors(self, count: int) -> Vectors: ...

    def clear(self) -> None: ...


class _Input:
    """One input on its way: input `choice` of a request."""

    __slots__ = ("choice", "task", "tokens")

    def __init__(self, task: Task, choice: int) -> None:
        self.task = task
        self.choice = choice
        self.tokens = task.prompt[task.starts[choice] : task.starts[choice + 1]]


class Embedder:
    """One context of the engine. `run` until the backlog is closed."""

    def __init__(
        self,
        index: int,
        encoder: Encoder,
        batch_tokens: int,
        *,
        backlog: Backlog,
        meter: Meter,
        send: Callable[[Frame], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`batch_tokens`: after so many a batch is full; the encoder's own limit may be higher."""
        self._index = index
        self._encoder = encoder
        self._batch_tokens = min(batch_tokens, encoder.batch_tokens)
        self._backlog = backlog
        self._meter = meter
        self._send = send
        self._clock = clock
        self._waiting: deque[_Input] = deque()
        self._waiting_tokens = 0
        self._errors_in_a_row = 0
        self._step_ended_s = 0.0
        self._started: list[int] = []
        self._finished: list[Answer] = []

    def run(self) -> None:
        """Step until the backlog is closed. Raises `EngineError` if llama.cpp cannot go on."""
        while self._backlog.wait(self._index):
            self._step_ended_s = self._clock()
            self._meter.wake(self._step_ended_s)
            while not self._backlog.closed and self.step():
                pass
            self._meter.sleep(self._clock())

    def step(self) -> bool:
        """One batch. False if there was nothing to do."""
        self._take()
        used = len(self._waiting)
        batch = self._next_batch()
        if not batch:
            self._emit()
            return False
        self._emit()  # what has started, before it is computed: see `workers.stepper`
        began_s = self._clock()
        tokens = self._fill(batch)
        code = self._encoder.encode(tokens)
        if code:
            self._fail_batch(batch, code)
        else:
            self._errors_in_a_row = 0
            vectors = self._encoder.vectors(len(batch))
        decoded_s = self._clock()
        if not code:
            self._hand_out(batch, vectors)
        self._emit()
        ended_s = self._clock()
        self._meter.step(
            ended_s,
            prompt_tokens=tokens,
            output_tokens=0,
            slot_s=used * (ended_s - self._step_ended_s),
            decode_s=decoded_s - began_s,
            sample_s=0.0,
            gaps_s=_NO_GAPS,
        )
        self._step_ended_s = ended_s
        return True

    # ------------------------------------------------ into a batch

    def _take(self) -> None:
        """Take inputs until there are enough for a batch."""
        while self._waiting_tokens < self._batch_tokens and len(self._waiting) < self._encoder.sequences:
            room = min(TAKEN_AT_ONCE, self._encoder.sequences - len(self._waiting))
            taken = self._backlog.take(self._index, room, self._clock())
            if not taken:
                return
            for task, choice in taken:
                if choice == 0:
                    self._started.append(task.key)
                one = _Input(task, choice)
                self._waiting.append(one)
                self._waiting_tokens += one.tokens.size

    def _next_batch(self) -> list[_Input]:
        """The oldest inputs that fit, at least one if there is any. Cancelled ones end here."""
        batch: list[_Input] = []
        tokens = 0
        while self._waiting and len(batch) < self._encoder.sequences:
            one = self._waiting[0]
            if batch and tokens + one.tokens.size > self._batch_tokens:
                break
            self._waiting.popleft()
            self._waiting_tokens -= one.tokens.size
            if one.task.cancelled:
                self._finish(one, CANCELLED)
                continue
            batch.append(one)
            tokens += one.tokens.size
        return batch

    def _fill(self, batch: list[_Input]) -> int:
        """Put `batch` into the encoder's arrays, a sequence each. Returns the number of rows."""
        lengths = np.array([one.tokens.size for one in batch])
        ends = np.cumsum(lengths)
        rows = int(ends[-1])
        encoder = self._encoder
        np.concatenate([one.tokens for one in batch], out=encoder.token[:rows])
        encoder.pos[:rows] = np.arange(rows) - np.repeat(ends - lengths, lengths)
        encoder.seq[:rows] = np.repeat(np.arange(len(batch)), lengths)
        return rows

    # ------------------------------------------------ out of a batch

    def _hand_out(self, batch: list[_Input], vectors: Vectors) -> None:
        damaged = ~np.isfinite(vectors.sum(axis=1))
        if damaged.any():
            self._encoder.clear()
        vectors = normalised(np.where(damaged[:, None], np.float32(0), vectors))
        for place, one in enumerate(batch):
            if damaged[place]:
                self._finish(one, "error", f"the model gave NaN or infinite values for input {one.choice}")
                continue
            target = one.task.vectors
            vector = vectors[place, : target.shape[1]]
            target[one.choice] = vector if vector.size == vectors.shape[1] else normalised(vector[None])[0]
            self._finish(one, "stop")

    def _fail_batch(self, batch: list[_Input], code: int) -> None:
        """llama.cpp refused a batch: its requests fail."""
        self._errors_in_a_row += 1
        reason = f"llama.cpp {failed(code)} on a batch of {len(batch)} inputs"
        if code < -1 or self._errors_in_a_row >= ERRORS_IN_A_ROW_MAX:
            raise EngineError(f"{reason}; if memory is short, use a smaller --batch or --ctx")
        for one in batch:
            self._finish(one, "error", reason)

    def _finish(self, one: _Input, reason: str, error: str | None = None) -> None:
        if self._backlog.finish(self._index, one.task, one.choice, Choice("", reason, 0), error):
            self._finished.append(one.task.answer(self._clock()))

    def _emit(self) -> None:
        if self._started or self._finished:
            frame = Frame(started=self._started, finished=self._finished, running=self._backlog.running)
            self._started, self._finished = [], []
            self._send(frame)


def normalised(vectors: Vectors) -> Vectors:
    """Each row divided by its length; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = vectors / np.where(lengths > 0, lengths, np.float32(1))
    return scaled
