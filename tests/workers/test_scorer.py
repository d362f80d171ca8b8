from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import EngineError
from scheduling.logprobs import TokenLogprobs, completion_logprobs
from scheduling.requests import Request, Sampling
from tests.workers import engine_fakes
from tests.workers.engine_fakes import EOG, VOCAB, FakeDecoder, remembered
from workers.backlog import Backlog
from workers.meter import Meter
from workers.protocol import Answer, Frame, Job, Stats
from workers.scorer import Scorer
from workers.task import Lane, Task
from workers.threads import Threads

CTX = 64
Tokens = tuple[int, ...]


class SharedDecoder(FakeDecoder):
    """A fake whose sequences share `cells_max` cells: those that hold the same tokens from the start on, as far as one
    was made from the other. Counted as if all common beginnings were shared, which is the least it can be."""

    def __init__(self, batch_tokens: int, cells_max: int) -> None:
        super().__init__(batch_tokens, CTX)
        self.remembers = True
        self.cells_max = cells_max
        self.rows = 0

    def decode(self, rows: int) -> int:
        code = super().decode(rows)
        self.rows += rows
        distinct = {tuple(cells[: place + 1]) for cells in self.cells.values() for place in range(len(cells))}
        assert len(distinct) <= self.cells_max, "no cell is left"
        return code


class Rig:
    """One scorer over a fake decoder, with a clock that counts its readings."""

    def __init__(
        self,
        *,
        sequences: int = 16,
        cells: int = CTX + 32,
        batch_tokens: int = 32,
        outputs: int = 16,
        reuse: bool = True,
        threads: int = 1,
    ) -> None:
        self.now = 0.0
        self.frames: list[Frame] = []
        self.stats: list[Stats] = []
        self.decoder = SharedDecoder(batch_tokens, cells)
        self.backlog = Backlog()
        self.meter = Meter(self.stats.append, 0.0)
        self.scorer = Scorer(
            self.backlog.open(Lane.SCORE),
            self.decoder,
            sequences=sequences,
            cells=cells,
            ctx_tokens=CTX,
            outputs=outputs,
            reuse=reuse,
            vocabulary=engine_fakes.vocabulary(),
            backlog=self.backlog,
            meter=self.meter,
            send=self.frames.append,
            threads=Threads(ThreadPoolExecutor(threads), threads) if threads > 1 else Threads(),
            clock=self.clock,
        )

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def submit(self, *jobs: Job) -> None:
        self.backlog.add(Task(one, self.now) for one in jobs)
        for one in jobs:
            task = self.backlog.next_raw()
            assert task is not None
            task.lane = Lane.SCORE
            task.prompt = np.array(one.request.prompt, np.int32)
            task.continuations = [np.array(tokens, np.int32) for tokens in one.request.continuations]
            task.limit = one.request.sampling.max_tokens or 0
            self.backlog.ready(task)

    def run(self) -> dict[int, Answer]:
        """Step until nothing is left; answers so far by key."""
        while self.scorer.step():
            pass
        return {answer.key: answer for frame in self.frames for answer in frame.finished}


def job(key: int, prompt: Tokens, *continuations: Tokens, max_tokens: int = 0, top: int = 0, **sampling: object) -> Job:
    request = Request(
        custom_id=str(key),
        kind="completion",
        prompt=prompt,
        logprobs=top,
        echo=not continuations,
        continuations=continuations,
        sampling=Sampling(**{"max_tokens": max_tokens, "temperature": 0.0} | sampling),  # type: ignore[arg-type]
    )
    return Job(key, 0, False, request)


def expected(tokens: Tokens, first: int) -> list[float]:
    """ln p of `tokens` from place `first` on, computed one by one in 64 bits."""
    found = []
    for place in range(first, len(tokens)):
        logits = np.arange(VOCAB, dtype=np.float32) / VOCAB
        logits[(tokens[place - 1] + 1) % VOCAB] = 9.0
        wide = (logits + remembered(list(tokens[:place]))).astype(np.float64)
        found.append(float(wide[tokens[place]] - math.log(np.exp(wide).sum())))
    return found


def packed(answer: Answer, choice: int = 0) -> TokenLogprobs:
    assert answer.error is None
    found = answer.choices[choice].logprobs
    assert found is not None
    return found


def values(answer: Answer, choice: int = 0) -> list[float]:
    found: list[float] = np.frombuffer(packed(answer, choice).logprobs, np.float32).tolist()
    return found


def test_a_prompt_has_a_log_probability_for_each_token_but_the_first() -> None:
    rig = Rig()
    rig.submit(job(7, (40, 41, 50, 33)))
    answer = rig.run()[7]
    assert math.isnan(values(answer)[0])
    assert values(answer)[1:] == pytest.approx(expected((40, 41, 50, 33), 1), abs=1e-5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ijsb", "length")
    assert (answer.prompt_tokens, answer.output_tokens) == (4, 0)
    assert rig.decoder.rows == 3, "nothing is asked of what follows the last token"
    assert 0 < answer.queue_s < answer.e2e_s


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    rig = Rig()
    rig.submit(job(1, (40,)))
    shape = completion_logprobs(packed(rig.run()[1]))
    assert (shape.tokens, shape.token_logprobs) == (["i"], [None])


def test_continuations_are_answered_in_their_order_each_with_its_sum() -> None:
    rig = Rig()
    given = ((41, 42), (50,), (41, 7, 9))
    rig.submit(job(1, (39, 40), *given))
    answer = rig.run()[1]
    assert [choice.text for choice in answer.choices] == ["jk", "s", "j<7><9>"]
    for place, tokens in enumerate(given):
        wanted = expected((39, 40, *tokens), 2)
        assert values(answer, place) == pytest.approx(wanted, abs=1e-5)
        assert packed(answer, place).total == pytest.approx(sum(wanted), abs=1e-5)
    assert [packed(answer, place).greedy for place in range(3)] == [True, False, False]
    assert answer.prompt_tokens == 2 + 6
    assert rig.decoder.rows == 2 + 1 + 2


def test_continuations_of_one_token_need_only_the_prompt() -> None:
    rig = Rig()
    rig.submit(job(1, (39, 40), *((token,) for token in range(VOCAB))))
    answer = rig.run()[1]
    assert math.fsum(math.exp(packed(answer, place).total) for place in range(VOCAB)) == pytest.approx(1, abs=1e-5)
    assert rig.decoder.rows == 2
    assert len(rig.decoder.batches) == 1


def test_alternatives_are_the_likeliest_tokens() -> None:
    rig = Rig()
    rig.submit(job(1, (10, 30), (50,), top=3))
    shape = completion_logprobs(packed(rig.run()[1]))
    assert shape.top_logprobs is not None
    (table,) = shape.top_logprobs
    assert table is not None
    assert next(iter(table)) == "<31>"
    assert len(table) == 4, "the token itself is there too"
    assert table["s"] == shape.token_logprobs[0]


@pytest.mark.parametrize(
    ("prompt", "sampling", "text", "reason", "made"),
    [
        ((39, 40), {}, "hij", "length", 1),
        ((5, 62), {}, "<5><62>", "stop", 1),
        ((39, 40), {"stop": ("j",)}, "hi", "stop", 1),
        ((39, 40), {"logit_bias": {41: -100.0, 50: 50.0}}, "his", "length", 1),
    ],
)
def test_one_token_more_is_chosen_as_any_other(
    prompt: Tokens, sampling: dict[str, object], text: str, reason: str, made: int
) -> None:
    rig = Rig()
    rig.submit(job(1, prompt, max_tokens=1, **sampling))  # type: ignore[arg-type]
    answer = rig.run()[1]
    assert (answer.choices[0].text, answer.choices[0].finish_reason, answer.output_tokens) == (text, reason, made)
    assert len(values(answer)) == 3
    assert answer.ttft_s > 0


def test_the_end_of_generation_is_not_chosen_where_it_is_ignored() -> None:
    rig = Rig()
    rig.submit(job(1, (5, 62), max_tokens=1, ignore_eos=True))
    assert f"<{EOG}>" not in completion_logprobs(packed(rig.run()[1])).tokens


def test_what_prompts_have_in_common_is_computed_once_also_while_it_is_being_read() -> None:
    rig = Rig(batch_tokens=8)
    question = tuple(range(1, 31))
    rig.submit(*(job(key, (*question, 40 + key, 9)) for key in range(4)))
    answers = rig.run()
    for key in range(4):
        assert values(answers[key])[1:] == pytest.approx(expected((*question, 40 + key, 9), 1), abs=1e-5)
    # Of the last common token each needs the row, and of the first that is its own.
    assert rig.decoder.rows == 31 + 3 * 2
    rig.submit(job(9, question, (40,), (50, 51)))
    rig.run()
    assert rig.decoder.rows == 31 + 3 * 2 + 1 + 1, "the same prompt with continuations: its last row, and one of theirs"


def test_more_alternatives_than_are_known_are_computed_anew() -> None:
    rig = Rig()
    prompt = tuple(range(1, 21))
    rig.submit(job(1, prompt, top=2))
    rig.run()
    rig.submit(job(2, prompt, top=5), job(3, prompt, top=1))
    answers = rig.run()
    assert packed(answers[2]).alternatives == 5
    assert packed(answers[3]).alternatives == 1
    assert rig.decoder.rows == 19 + 19 + 1


def test_models_whose_cells_cannot_be_taken_over_anywhere_share_only_a_prompt_with_its_continuations() -> None:
    rig = Rig(reuse=False)
    prompt = tuple(range(1, 11))
    rig.submit(job(1, prompt, (3, 4), (5, 6)), job(2, prompt, (3, 4)))
    answers = rig.run()
    assert rig.decoder.rows == 10 + 2 + 10 + 1
    assert values(answers[2]) == pytest.approx(expected((*prompt, 3, 4), 10), abs=1e-5)
    assert rig.decoder.cells == {}


WORK = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple),
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=5),
        st.integers(0, 1),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)


@given(
    WORK,
    st.sampled_from([(16, CTX + 32, 32, 16), (2, CTX, 5, 1), (4, CTX, 64, 64), (16, CTX, 7, 3), (6, CTX + 8, 16, 4)]),
    st.booleans(),
)
def test_what_is_shared_and_how_batches_fall_changes_no_answer(
    work: list[tuple[Tokens, list[Tokens], int, int]], room: tuple[int, int, int, int], reuse: bool
) -> None:
    """Prompts of few different tokens begin alike. Cells, sequences and rows are few, so much is dropped and split."""
    work = work + work[:3]
    sequences, cells, batch_tokens, outputs = room
    rig = Rig(sequences=sequences, cells=cells, batch_tokens=batch_tokens, outputs=outputs, reuse=reuse)
    rig.submit(*(job(key, prompt, *rest, max_tokens=more, top=k) for key, (prompt, rest, more, k) in enumerate(work)))
    answers = rig.run()
    assert len(answers) == len(work)
    for key, (prompt, rest, more, k) in enumerate(work):
        choices = rest or [()]
        for place, tokens in enumerate(choices):
            found = values(answers[key], place)
            assert packed(answers[key], place).alternatives == k
            if rest:
                assert found == pytest.approx(expected((*prompt, *tokens), len(prompt)), abs=1e-5)
            else:
                assert len(found) == len(prompt) + more
                assert found[1 : len(prompt)] == pytest.approx(expected(prompt, 1), abs=1e-5)
    assert rig.backlog.running == 0
    assert all(len(batch) <= batch_tokens for batch in rig.decoder.batches)
    naive = sum(len(prompt) + sum(len(tokens) for tokens in rest) for prompt, rest, _, _ in work)
    assert rig.decoder.rows <= naive


def test_many_continuations_run_side_by_side() -> None:
    rig = Rig(sequences=32, cells=CTX + 100, batch_tokens=64, outputs=64)
    rig.submit(job(1, (1, 2, 3), *((k, 1, 2) for k in range(20))))
    rig.run()
    assert [len(batch) for batch in rig.decoder.batches] == [3, 40]


def test_counters_and_started_requests_are_told() -> None:
    rig = Rig()
    rig.submit(job(1, (1, 2, 3), (4, 5)), job(2, (9, 8), max_tokens=1))
    rig.meter.wake(0.0)
    rig.run()
    rig.meter.sleep(rig.clock())
    (stats,) = rig.stats
    assert (stats.prompt_tokens, stats.output_tokens) == (3 + 1 + 2, 1)
    assert stats.decode_s > 0
    assert 0 < stats.slot_s <= 2 * stats.busy_s
    assert sorted(key for frame in rig.frames for key in frame.started) == [1, 2]
    assert rig.frames[-1].running == 0


def test_a_cancelled_request_leaves_nothing_and_those_that_waited_for_it_go_on() -> None:
    rig = Rig(batch_tokens=8)
    question = tuple(range(1, 31))
    rig.submit(job(1, (*question, 40)), job(2, (*question, 41)))
    rig.scorer.step()
    assert rig.backlog.cancel([1]) == []
    answers = rig.run()
    assert answers[1].choices[0].finish_reason == "cancelled"
    assert values(answers[2])[1:] == pytest.approx(expected((*question, 41), 1), abs=1e-5)


def test_nan_fails_the_request_that_is_to_blame_and_no_other() -> None:
    rig = Rig()
    rig.submit(job(1, (1, 2), (3, 4)), job(2, (5, 6, 7)), job(3, (8, 9)))
    spoiled = (5, 6)
    healthy = rig.decoder.decode

    def decode(rows: int) -> int:
        code = healthy(rows)
        # What is not a number comes out of every row that looks at the same cells.
        if any(tuple(cells[:2]) == spoiled for cells in rig.decoder.cells.values()):
            rig.decoder.logits(len(rig.decoder.logits_now))[:] = np.nan
        return code

    rig.decoder.decode = decode  # type: ignore[method-assign]
    answers = rig.run()
    assert "NaN" in (answers[2].error or "")
    assert values(answers[1]) == pytest.approx(expected((1, 2, 3, 4), 2), abs=1e-5)
    assert values(answers[3])[1:] == pytest.approx(expected((8, 9), 1), abs=1e-5)
    assert rig.backlog.running == 0


def test_a_refused_batch_fails_its_requests_and_the_others_start_again() -> None:
    rig = Rig(batch_tokens=4)
    rig.submit(job(1, (1,) * 5), job(2, (2,) * 5))
    rig.decoder.codes = [1]
    answers = rig.run()
    assert answers[1].error == "llama_decode failed with code 1"
    assert values(answers[2])[1:] == pytest.approx(expected((2,) * 5, 1), abs=1e-5)


@pytest.mark.parametrize("codes", [[-3], [1, 1, 1]])
def test_a_fatal_code_or_repeated_errors_end_the_engine(codes: list[int]) -> None:
    rig = Rig(batch_tokens=2)
    rig.submit(*(job(key, (key,) * 3) for key in range(4)))
    rig.decoder.codes = codes
    with pytest.raises(EngineError, match=f"code {codes[-1]}"):
        rig.run()


def test_many_threads_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.scorer.PARALLEL_ELEMENTS_MIN", 0)
    one, many = Rig(), Rig(threads=3)
    for rig in (one, many):
        rig.submit(*(job(key, (key, 2, 3, 4), (5, 6), top=2) for key in range(9)))
    found, wanted = many.run(), one.run()
    assert {key: msgspec.structs.astuple(packed(answer)) for key, answer in found.items()} == {
        key: msgspec.structs.astuple(packed(answer)) for key, answer in wanted.items()
    }
