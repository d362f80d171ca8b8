"""The embedding loop over a fake encoder: what makes a batch, and what becomes of each input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scheduling.errors import EngineError
from scheduling.requests import Request
from scheduling.vectors import from_bytes
from workers.backlog import Backlog
from workers.embedder import ERRORS_IN_A_ROW_MAX, Embedder, normalised
from workers.meter import Meter
from workers.protocol import Answer, Frame, Job, Stats
from workers.task import Lane, Task

DIMENSIONS = 3
DAMAGED = 13
"""A token whose sequence has no vector that is finite."""


class FakeEncoder:
    """A `workers.embedder.Encoder`: a sequence's vector is (first token, number of tokens, 1). `batches`: lengths."""

    def __init__(self, batch_tokens: int, sequences: int) -> None:
        self.batch_tokens = batch_tokens
        self.sequences = sequences
        self.token = np.zeros(batch_tokens, np.int32)
        self.pos = np.zeros(batch_tokens, np.int32)
        self.seq = np.zeros(batch_tokens, np.int32)
        self.batches: list[list[int]] = []
        self.codes: list[int] = []
        """Codes of the next batches; 0 when empty."""
        self.cleared = 0
        self._vectors: list[list[float]] = []

    def encode(self, rows: int) -> int:
        assert 0 < rows <= self.batch_tokens
        seq = self.seq[:rows].tolist()
        assert seq == sorted(seq)
        lengths = np.bincount(self.seq[:rows]).tolist()
        assert len(lengths) <= self.sequences
        assert all(lengths), "each sequence has tokens"
        assert self.pos[:rows].tolist() == [place for length in lengths for place in range(length)]
        self.batches.append(lengths)
        if self.codes and (code := self.codes.pop(0)):
            return code
        self._vectors = []
        for one in range(len(lengths)):
            tokens = self.token[:rows][self.seq[:rows] == one].tolist()
            first = np.nan if DAMAGED in tokens else tokens[0]
            self._vectors.append([first, len(tokens), 1.0])
        return 0

    def vectors(self, count: int) -> npt.NDArray[np.float32]:
        assert count == len(self._vectors)
        return np.array(self._vectors, np.float32)

    def clear(self) -> None:
        self.cleared += 1


class Rig:
    """One embedder, with a clock that counts its readings."""

    def __init__(self, *, batch_tokens: int = 8, longest: int = 8, sequences: int = 4, contexts: int = 1) -> None:
        self.now = 0.0
        self.frames: list[Frame] = []
        self.stats: list[Stats] = []
        self.encoder = FakeEncoder(max(batch_tokens, longest), sequences)
        self.backlog = Backlog()
        self.meter = Meter(self.stats.append, 0.0)
        self.embedder = Embedder(
            self.backlog.open(Lane.EMBED),
            self.encoder,
            batch_tokens,
            backlog=self.backlog,
            meter=self.meter,
            send=self.frames.append,
            clock=self.clock,
        )
        for _ in range(contexts - 1):
            self.backlog.open(Lane.EMBED)

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def submit(self, key: int, *inputs: tuple[int, ...], dimensions: int = DIMENSIONS) -> None:
        request = Request(custom_id=str(key), kind="embedding", inputs=inputs)
        self.backlog.add([Task(Job(key, 0, False, request), self.now)])
        task = self.backlog.next_raw()
        assert task is not None
        task.lane = Lane.EMBED
        task.prompt = np.array([token for tokens in inputs for token in tokens], np.int32)
        task.starts = np.cumsum([0, *(len(tokens) for tokens in inputs)], dtype=np.int32)
        task.vectors = np.empty((len(inputs), dimensions), np.float32)
        task.limit = 1
        self.backlog.ready(task)

    def run(self) -> dict[int, Answer]:
        while self.embedder.step():
            pass
        return {answer.key: answer for frame in self.frames for answer in frame.finished}


def unit(*values: float) -> Any:
    vector = np.array(values)
    return pytest.approx((vector / np.linalg.norm(vector)).tolist())


def vectors(answer: Answer) -> list[list[float]]:
    assert answer.error is None
    return from_bytes(answer.vectors, len(answer.choices)).tolist()  # type: ignore[no-any-return]


def tokens(*lengths: int) -> Iterable[tuple[int, ...]]:
    return [(length,) * length for length in lengths]


def test_an_answer_has_a_vector_of_length_1_for_each_input_in_order() -> None:
    rig = Rig()
    rig.submit(5, (2, 9), (7,), (3, 3, 3))
    answer = rig.run()[5]
    assert vectors(answer) == [unit(2, 2, 1), unit(7, 1, 1), unit(3, 3, 1)]
    assert (answer.prompt_tokens, answer.output_tokens, answer.ttft_s) == (6, 0, 0.0)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    assert 0 < answer.queue_s < answer.e2e_s


def test_inputs_of_several_requests_share_a_batch_up_to_its_tokens() -> None:
    rig = Rig(batch_tokens=8)
    for key, one in enumerate(tokens(3, 3, 3, 5, 1)):
        rig.submit(key, one)
    assert len(rig.run()) == 5
    assert rig.encoder.batches == [[3, 3], [3, 5], [1]]


def test_a_batch_has_no_more_inputs_than_the_context_has_sequences() -> None:
    rig = Rig(batch_tokens=8, sequences=2)
    rig.submit(0, *tokens(1, 1, 1))
    assert len(rig.run()) == 1
    assert rig.encoder.batches == [[1, 1], [1]]


def test_an_input_longer_than_a_batch_goes_alone() -> None:
    rig = Rig(batch_tokens=4, longest=10)
    rig.submit(0, *tokens(1, 10, 1))
    assert vectors(rig.run()[0])[1] == unit(10, 10, 1)
    assert rig.encoder.batches == [[1], [10], [1]]


def test_no_more_is_taken_than_a_batch_needs() -> None:
    rig = Rig(batch_tokens=4, sequences=100)
    for key in range(60):
        rig.submit(key, (1, 1))
    rig.embedder.step()
    assert len(rig.backlog.recall(range(60))) >= 60 - 16


def test_one_of_two_contexts_takes_its_share_of_the_inputs() -> None:
    rig = Rig(batch_tokens=8, sequences=8, contexts=2)
    rig.submit(0, *tokens(1, 1, 1, 1))
    rig.embedder.step()
    assert rig.encoder.batches == [[1, 1]]


def test_dimensions_keep_the_first_numbers_and_the_length_of_1() -> None:
    rig = Rig()
    rig.submit(0, (2, 9), (4,), dimensions=2)
    assert vectors(rig.run()[0]) == [unit(2, 2), unit(4, 1)]


def test_a_damaged_vector_fails_its_request_and_the_cells_are_overwritten() -> None:
    rig = Rig()
    rig.submit(0, (1,), (DAMAGED, 2))
    rig.submit(1, (5,))
    answers = rig.run()
    assert answers[0].error == "the model gave NaN or infinite values for input 1"
    assert answers[0].vectors == b""
    assert vectors(answers[1]) == [unit(5, 1, 1)]
    assert rig.encoder.cleared == 1


def test_what_is_left_of_a_failed_request_is_not_computed() -> None:
    rig = Rig(batch_tokens=2, sequences=2)
    rig.submit(0, *[(DAMAGED,), *tokens(1, 1, 1, 1, 1)])
    assert rig.run()[0].error is not None
    assert sum(len(batch) for batch in rig.encoder.batches) <= 3
    assert rig.backlog.running == 0


def test_a_batch_that_is_refused_fails_its_requests_alone() -> None:
    rig = Rig(batch_tokens=2)
    rig.encoder.codes = [-1]
    for key in range(3):
        rig.submit(key, (4, 4))
    answers = rig.run()
    assert "code -1" in (answers[0].error or "")
    assert (answers[1].error, answers[2].error) == (None, None)
    assert rig.backlog.running == 0


@pytest.mark.parametrize("codes", [[-2], [-1] * ERRORS_IN_A_ROW_MAX])
def test_a_context_that_cannot_go_on_ends_the_engine(codes: list[int]) -> None:
    rig = Rig(batch_tokens=1)
    rig.encoder.codes = codes
    for key in range(5):
        rig.submit(key, (4,))
    with pytest.raises(EngineError, match=f"code {codes[0]}"):
        rig.run()
    assert 0 in rig.frames[0].started, "what it died of was told before"


def test_a_cancelled_request_ends_without_being_computed_further() -> None:
    rig = Rig(batch_tokens=2, sequences=4)
    rig.submit(0, *tokens(1, 1, 1, 1, 1, 1))
    rig.embedder.step()
    assert rig.backlog.cancel([0]) == []
    answer = rig.run()[0]
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2 + ["cancelled"] * 4
    assert rig.encoder.batches == [[1, 1]]
    assert rig.backlog.running == 0


def test_tokens_and_batches_are_counted() -> None:
    rig = Rig(batch_tokens=4)
    rig.submit(0, *tokens(3, 3))
    rig.meter.wake(rig.now)
    rig.run()
    rig.meter.sleep(rig.clock())
    (stats,) = rig.stats
    assert (stats.steps, stats.prompt_tokens, stats.output_tokens) == (2, 6, 0)
    assert stats.slot_s > 0
    assert sum(stats.itl_counts) == 0


def test_each_request_is_told_once_to_have_started() -> None:
    rig = Rig(batch_tokens=2)
    rig.submit(0, *tokens(1, 1, 1))
    rig.submit(1, (2, 2))
    rig.run()
    assert [key for frame in rig.frames for key in frame.started] == [0, 1]


def test_a_row_of_zeros_stays_one() -> None:
    assert normalised(np.zeros((1, 2), np.float32)).tolist() == [[0, 0]]
