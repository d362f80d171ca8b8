from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import EngineError
from scheduling.logprobs import completion_logprobs
from tests.workers import engine_fakes
from tests.workers.engine_fakes import EOG, VOCAB, FakeDecoder, job, passes, piece_of
from workers import chooser as chooser_module
from workers.backlog import Backlog
from workers.constraints import Constraints
from workers.drafting import Drafting
from workers.meter import Meter
from workers.protocol import Answer, Frame, Job, Stats
from workers.shape import Shape
from workers.stepper import Stepper
from workers.task import Lane, Task


@pytest.fixture(autouse=True, params=[False, True], ids=["host", "device"])
def _device_chooses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this holds wherever tokens are chosen."""
    monkeypatch.setattr(FakeDecoder, "chooses", request.param)


class Rig:
    """One stepper over a fake decoder, with a clock that counts its readings."""

    def __init__(
        self,
        slots: int = 4,
        ctx_tokens: int = 100,
        batch_tokens: int = 64,
        threads: int = 1,
        shape: Shape = Shape(),  # noqa: B008
        constraints: Constraints | None = None,
        drafting: Drafting | None = None,
        reads_all: bool = False,
    ) -> None:
        self.now = 0.0
        self.frames: list[Frame] = []
        self.stats: list[Stats] = []
        self.decoder = FakeDecoder(batch_tokens, ctx_tokens, reads_all)
        self.backlog = Backlog()
        self.meter = Meter(self.stats.append, 0.0)
        self.ctx_tokens = ctx_tokens
        self.constraints = constraints
        self.stepper = Stepper(
            self.backlog.open(Lane.GENERATE),
            self.decoder,
            slots,
            ctx_tokens,
            vocabulary=engine_fakes.vocabulary(),
            backlog=self.backlog,
            meter=self.meter,
            send=self.frames.append,
            constraints=constraints,
            shape=shape,
            pool=ThreadPoolExecutor(threads) if threads > 1 else None,
            pool_threads=threads,
            drafting=drafting,
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
            prompt = one.request.prompt
            assert isinstance(prompt, tuple)
            task.prompt = np.array(prompt, np.int32)
            asked = one.request.sampling.max_tokens
            if self.constraints is not None and (asked_text := one.request.sampling.constraint) is not None:
                task.grammar = self.constraints.grammar(asked_text)
            task.limit = min(self.ctx_tokens if asked is None else asked, self.ctx_tokens - len(prompt))
            self.backlog.ready(task)

    def run(self) -> dict[int, Answer]:
        """Step until nothing is left; answers so far by key."""
        while self.stepper.step():
            pass
        return self.answers()

    def answers(self) -> dict[int, Answer]:
        return {answer.key: answer for frame in self.frames for answer in frame.finished}

    def streamed(self, key: int, choice: int = 0) -> list[str]:
        pieces = [piece for frame in self.frames for piece in frame.pieces]
        return [piece.text for piece in pieces if (piece.key, piece.choice) == (key, choice)]


def only(answer: Answer) -> tuple[str, str, int]:
    (choice,) = answer.choices
    return choice.text, choice.finish_reason, choice.output_tokens


def test_a_request_runs_to_its_limit() -> None:
    rig = Rig()
    rig.submit(job(7, (30, 31)))
    answer = rig.run()[7]
    assert only(answer) == ("abcd", "length", 4)
    assert (answer.prompt_tokens, answer.output_tokens, answer.error) == (2, 4, None)
    assert 0 < answer.queue_s < answer.ttft_s < answer.e2e_s
    assert rig.decoder.cells == {}


def test_a_request_ends_at_the_end_of_generation_without_its_text() -> None:
    rig = Rig()
    rig.submit(job(1, (60,), max_tokens=50))
    assert only(rig.run()[1]) == ("<61><62>", "stop", 3)


def test_ignore_eos_never_ends_early() -> None:
    rig = Rig()
    rig.submit(job(1, (61,), ignore_eos=True, max_tokens=6), job(2, (61,), ignore_eos=True, temperature=1.0))
    answers = rig.run()
    # With the end of generation silenced, the fake model's second choice is 62 for ever.
    assert only(answers[1]) == ("<62>" * 6, "length", 6)
    assert answers[2].choices[0].output_tokens == 4
    assert f"<{EOG}>" not in answers[2].choices[0].text


@pytest.mark.parametrize("requests", [1, 2])
def test_a_full_slot_ends_a_request(requests: int) -> None:
    """Alone it goes another way than beside others."""
    rig = Rig(ctx_tokens=8)
    rig.submit(*(job(key, (32,) * 5, max_tokens=50) for key in range(requests)))
    answers = rig.run()
    assert [only(answers[key])[1:] for key in range(requests)] == [("length", 3)] * requests


def test_many_more_requests_than_slots_are_all_answered_in_full() -> None:
    rig = Rig(slots=3, batch_tokens=7)
    rig.submit(*(job(key, (1,) * (1 + key % 11), max_tokens=1 + key % 5) for key in range(40)))
    answers = rig.run()
    assert sorted(answers) == list(range(40))
    assert all(answer.output_tokens == 1 + key % 5 for key, answer in answers.items())
    assert sorted(key for frame in rig.frames for key in frame.started) == list(range(40))
    assert max(max(batch) for batch in rig.decoder.batches) == 2
    assert rig.backlog.running == 0


@pytest.mark.parametrize(
    ("shape", "running"), [(Shape(), 1), (Shape(steady=True), 30)], ids=["mixed", "steady among many"]
)
def test_long_prompts_are_read_in_pieces_that_keep_gaps_short(shape: Shape, running: int) -> None:
    rig = Rig(slots=running + 1, batch_tokens=600, ctx_tokens=700, shape=shape)
    real, seen = rig.decoder.decode, [0]

    def slow(rows: int) -> int:
        """A pass takes 20 ms, and 1 ms for each row beyond those that decode."""
        rig.now += 0.02 + 0.001 * abs(rows - running)
        seen.append(rows)
        return real(rows)

    rig.decoder.decode = slow  # type: ignore[method-assign]
    rig.submit(*(job(100 + key, (1,), max_tokens=90, ignore_eos=True) for key in range(running)))
    for _ in range(20):
        rig.stepper.step()
    rig.submit(*(job(key, (2,) * 500, max_tokens=1) for key in range(2, 6)))
    for _ in range(3):
        rig.stepper.step()
    first = max(seen)
    seen.clear()
    for _ in range(20):
        rig.stepper.step()
    assert first > 200, "what it costs is not known yet"
    assert 32 <= max(seen) <= 65
    assert rig.run()[5].output_tokens == 1


def test_a_long_prompt_does_not_stop_the_others() -> None:
    rig = Rig(batch_tokens=8)
    rig.submit(job(1, (1,), max_tokens=10))
    rig.stepper.step()
    rig.submit(job(2, (2,) * 50))
    for _ in range(4):
        rig.stepper.step()
        assert rig.decoder.batches[-1] == [0] + [1] * 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_split_over_tokens_ends_the_text_before_it(stream: bool) -> None:
    rig = Rig()
    rig.submit(job(1, (31,), max_tokens=20, stop=("de",), stream=stream))
    assert only(rig.run()[1]) == ("abc", "stop", 5)
    assert "".join(rig.streamed(1)) == ("abc" if stream else "")


def test_streamed_pieces_are_the_text_and_count_its_tokens() -> None:
    rig = Rig()
    rig.submit(job(1, (31,), max_tokens=6, stream=True), job(2, (31,), max_tokens=6))
    answers = rig.run()
    assert rig.streamed(1) == list("abcdef")
    assert only(answers[1]) == only(answers[2]) == ("abcdef", "length", 6)
    assert sum(piece.tokens for frame in rig.frames for piece in frame.pieces) == 6


def test_a_held_back_beginning_of_a_stop_string_comes_out_at_the_end() -> None:
    rig = Rig()
    rig.submit(job(1, (31,), max_tokens=3, stop=("cX",), stream=True))
    assert only(rig.run()[1]) == ("abc", "length", 3)
    assert rig.streamed(1) == ["a", "b", "c"]


def test_choices_are_answered_together_with_seeds_of_their_own() -> None:
    rig = Rig(slots=2)
    # 9 against 63 others: hot enough that two choices differ.
    rig.submit(job(1, n=3, temperature=30.0, seed=5), job(2, n=1, temperature=30.0, seed=5))
    answers = rig.run()
    texts = [choice.text for choice in answers[1].choices]
    assert len(set(texts)) == 3
    assert texts[0] == answers[2].choices[0].text
    assert answers[1].output_tokens == sum(choice.output_tokens for choice in answers[1].choices)


def test_a_seed_gives_the_same_text_whatever_runs_beside_it() -> None:
    alone, crowd = Rig(slots=1), Rig(slots=4)
    alone.submit(job(1, temperature=30.0, seed=11, max_tokens=20))
    crowd.submit(
        job(0, (9, 9, 9), temperature=5.0, seed=3, max_tokens=30),
        job(1, temperature=30.0, seed=11, max_tokens=20),
        job(2, (8,), max_tokens=9),
    )
    assert only(alone.run()[1]) == only(crowd.run()[1])


def test_damaged_logits_fail_their_request_alone() -> None:
    rig = Rig()
    rig.submit(job(1), job(2), job(3, temperature=1.0))
    rig.decoder.damage = {0, 2}
    answers = rig.run()
    assert "NaN or infinite" in (answers[1].error or "")
    assert "output token 1" in (answers[3].error or "")
    assert answers[1].choices == []
    assert answers[2].error is None
    assert rig.backlog.running == 0


@pytest.mark.parametrize("shape", [Shape(), Shape(steady=True, moves=True)], ids=["mixed", "steady"])
def test_damaged_cells_do_not_come_back_under_the_next_request(shape: Shape) -> None:
    rig = Rig(slots=3, shape=shape)
    rig.submit(*(job(key, (key,) * 4, max_tokens=14 - key) for key in range(12)))
    rig.meter.wake(0.0)
    rig.decoder.damage = {1}
    answers = rig.run()
    assert [key for key, answer in answers.items() if answer.error] == [1]
    assert all(only(answers[key])[2] == 14 - key for key in answers if key != 1)
    rig.meter.sleep(rig.clock())
    assert sum(stats.output_tokens for stats in rig.stats) == sum(answer.output_tokens for answer in answers.values())
    assert sum(stats.prompt_tokens for stats in rig.stats) == 12 * 4


def test_a_refused_batch_fails_its_requests_and_the_others_start_again() -> None:
    rig = Rig(batch_tokens=4)
    rig.submit(job(1, (1,) * 4), job(2, (2,) * 4))
    rig.decoder.codes = [1]
    answers = rig.run()
    assert answers[1].error == "llama_decode failed with code 1"
    assert only(answers[2])[1:] == ("length", 4)


def test_passes_that_only_read_do_not_hide_that_every_other_is_refused() -> None:
    rig = Rig(slots=2, shape=Shape(steady=True))
    rig.submit(*(job(key, (1,) * 5) for key in range(20)))
    rig.decoder.codes = [0, 1] * 40
    with pytest.raises(EngineError, match="code 1"):
        rig.run()


@pytest.mark.parametrize("codes", [[-3], [1, 1, 1]])
def test_a_fatal_code_or_repeated_errors_end_the_engine(codes: list[int]) -> None:
    rig = Rig(slots=1)
    rig.submit(job(1), job(2), job(3))
    rig.decoder.codes = list(codes)
    with pytest.raises(EngineError, match=f"code {codes[-1]}"):
        rig.run()


def test_a_context_that_is_out_of_memory_says_so() -> None:
    rig = Rig()
    rig.submit(job(1))
    rig.decoder.codes = [-2]
    with pytest.raises(EngineError, match="code -2, out of memory, on"):
        rig.run()


def test_what_starts_is_told_before_it_is_computed() -> None:
    """An engine that dies of it cannot tell afterwards."""
    rig = Rig(slots=2)
    rig.submit(job(1), job(2), job(3))
    rig.decoder.codes = [-3]
    with pytest.raises(EngineError):
        rig.run()
    assert [frame.started for frame in rig.frames] == [[1, 2]]


def test_cancel_frees_the_slot_and_answers_with_what_there_is() -> None:
    rig = Rig(slots=1)
    rig.submit(job(1, (31,), max_tokens=50), job(2))
    rig.stepper.step()
    rig.stepper.step()
    assert rig.backlog.cancel([1]) == []
    answers = rig.run()
    assert only(answers[1]) == ("ab", "cancelled", 2)
    assert only(answers[2])[1] == "length"


def test_counters_add_up() -> None:
    rig = Rig()
    rig.submit(job(1, (1, 2, 3)), job(2, (1,), max_tokens=2))
    rig.meter.wake(0.0)
    rig.run()
    rig.meter.sleep(rig.clock())
    stats = rig.stats[0]
    assert (stats.prompt_tokens, stats.output_tokens, stats.steps) == (4, 6, 4)
    assert sum(stats.itl_counts) == 3 + 1
    assert stats.decode_s > 0
    assert 0 < stats.slot_s <= 2 * stats.busy_s


def test_a_step_that_brings_nothing_sends_nothing() -> None:
    rig = Rig(batch_tokens=4)
    rig.submit(job(1, (1,) * 20))
    rig.stepper.step()
    assert [frame.started for frame in rig.frames] == [[1]]
    rig.stepper.step()
    assert len(rig.frames) == 1


def test_each_output_token_has_its_log_probability_before_bias_and_penalties() -> None:
    rig = Rig()
    rig.submit(
        job(1, (30,), max_tokens=3, logprobs=2, logit_bias={40: 50.0}, repeat_penalty=2.0),
        job(2, (30,), max_tokens=3),
        job(3, (60,), max_tokens=9, logprobs=0),
    )
    answers = rig.run()
    row = np.arange(VOCAB, dtype=np.float64) / VOCAB
    row[31] = 9.0
    first = row - np.log(np.exp(row).sum())
    packed = answers[1].choices[0].logprobs
    assert packed is not None
    shape = completion_logprobs(packed)
    assert shape.tokens == ["i"] * 3
    assert shape.token_logprobs[0] == pytest.approx(first[40], abs=1e-5)
    assert shape.top_logprobs is not None
    assert shape.top_logprobs[0] == pytest.approx({"<31>": first[31], "<63>": first[63], "i": first[40]}, abs=1e-5)
    assert not packed.greedy
    assert answers[2].choices[0].logprobs is None
    ended = answers[3].choices[0]
    assert (ended.text, ended.output_tokens) == ("<61><62>", 3)
    assert ended.logprobs is not None
    assert completion_logprobs(ended.logprobs).tokens == ["<61>", "<62>", "<63>"]
    assert ended.logprobs.greedy


def test_log_probabilities_follow_a_sequence_that_moves_or_starts_again() -> None:
    rig = Rig(slots=6, shape=SHAPED)
    rig.submit(*(job(key, (key,), max_tokens=2 + 3 * key, logprobs=1, ignore_eos=True) for key in range(12)))
    rig.decoder.damage = {2}
    answers = rig.run()
    for key, answer in answers.items():
        if answer.error is None:
            packed = answer.choices[0].logprobs
            assert packed is not None
            tokens = completion_logprobs(packed).tokens
            assert tokens == [piece_of((key + 1 + place) % VOCAB).decode() for place in range(2 + 3 * key)]
            assert packed.greedy
    assert sum(answer.error is not None for answer in answers.values()) == 1


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_echo_puts_the_prompt_before_the_answer(stop: tuple[str, ...]) -> None:
    rig = Rig()
    rig.submit(job(1, (32, 33), echo=True, stop=stop))
    assert only(rig.run()[1]) == ("abcdef", "length", 4)


SHAPED = Shape(steady=True, pad_tokens=8, moves=True, patience=0.6)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=40),
    st.sampled_from([SHAPED, Shape(steady=True), Shape(steady=True, pad_tokens=100, patience=3.0)]),
)
def test_the_shape_of_batches_changes_no_answer(work: list[tuple[int, int, int]], shape: Shape) -> None:
    jobs = [
        job(key, (first,) * length, max_tokens=output, ignore_eos=True)
        for key, (length, output, first) in enumerate(work)
    ]
    plain, shaped = Rig(slots=6, batch_tokens=32, ctx_tokens=42), Rig(6, 42, 32, shape=shape)
    plain.submit(*jobs)
    shaped.submit(*jobs)
    expected, got = plain.run(), shaped.run()
    assert {key: only(answer) for key, answer in got.items()} == {key: only(answer) for key, answer in expected.items()}
    # What was in a sequence's cells when it ended is its prompt and its output but for the last token.
    for length, output, first in work:
        cells = [first] * length + [(first + place) % VOCAB for place in range(1, output)]
        assert tuple(cells) in shaped.decoder.emptied
    assert shaped.backlog.running == 0


def test_shaped_batches_are_one_pass_each() -> None:
    rig = Rig(slots=8, batch_tokens=200, ctx_tokens=60, shape=SHAPED)
    random = np.random.default_rng(1)
    rig.submit(
        *(
            job(key, (1,) * int(random.integers(2, 9)), max_tokens=int(random.integers(1, 40)), ignore_eos=True)
            for key in range(60)
        )
    )
    assert len(rig.run()) == 60
    counts = [passes(batch) for batch in rig.decoder.batches]
    assert set(counts) == {1}
    reads = sum(len(batch) > len(set(batch)) for batch in rig.decoder.batches)
    assert reads < 30, "several prompts are read at once"


def running(rig: Rig) -> int:
    rig.stepper.step()
    return rig.backlog.running


def test_requests_wait_for_others_to_be_read_with_them_for_a_time() -> None:
    rig = Rig(slots=4, shape=Shape(steady=True, patience=1.0))
    rig.submit(
        *(job(key, max_tokens=30) for key in range(3)),
        job(3, max_tokens=2),
        *(job(4 + k, max_tokens=2) for k in range(5)),
    )
    # A slot becomes free, five requests wait for it: three rows decode, so it is kept idle for three steps.
    assert [running(rig) for _ in range(5)] == [4, 3, 3, 3, 4]
    assert len(rig.run()) == 9


def test_nobody_waits_where_there_are_slots_for_all() -> None:
    rig = Rig(slots=8, shape=Shape(steady=True, patience=1e9))
    rig.submit(*(job(key, max_tokens=30) for key in range(6)))
    assert running(rig) == 6
    rig.submit(job(6))
    assert running(rig) == 7


def test_eight_are_enough_to_be_read_together() -> None:
    rig = Rig(slots=9, shape=Shape(steady=True, patience=1e9))
    rig.submit(
        job(0, max_tokens=30),
        *(job(key, max_tokens=2) for key in range(1, 9)),
        *(job(9 + k, max_tokens=2) for k in range(20)),
    )
    assert [running(rig) for _ in range(3)] == [9, 1, 9]


@pytest.mark.parametrize("moves", [True, False])
def test_the_decode_pass_becomes_narrow_when_most_are_done(moves: bool) -> None:
    rig = Rig(slots=16, ctx_tokens=300, shape=Shape(steady=True, moves=moves))
    rig.submit(*(job(key, max_tokens=3) for key in range(16)))
    rig.run()
    rig.submit(job(16, max_tokens=20, ignore_eos=True), job(17, max_tokens=20, ignore_eos=True))
    rig.run()
    assert [len(batch) for batch in rig.decoder.batches[-10:]] == [2] * 10


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_many_threads_choose_what_one_does(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser_module, "PARALLEL_ELEMENTS_MIN", 0)
    work: Callable[[], list[Job]] = lambda: [  # noqa: E731
        job(key, (key % 60,), temperature=float(key % 3), seed=key, ignore_eos=key % 2 == 0) for key in range(20)
    ]
    one, many = Rig(slots=5), Rig(slots=5, threads=threads)
    one.submit(*work())
    many.submit(*work())
    expected, got = one.run(), many.run()
    assert {key: answer.choices for key, answer in got.items()} == {
        key: answer.choices for key, answer in expected.items()
    }


def test_rows_are_fetched_from_the_device_only_where_more_than_the_largest_is_needed() -> None:
    rig = Rig()
    rig.submit(*(job(key, max_tokens=8) for key in range(6)))
    rig.run()
    assert rig.decoder.fetched == 0
    rig.submit(job(10, max_tokens=5), job(11, max_tokens=5, temperature=1.5, typical_p=0.9), job(12, max_tokens=5))
    rig.run()
    assert rig.decoder.fetched == (5 if rig.decoder.chooses else 0)
