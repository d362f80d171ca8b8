"""The simulated engine: it takes the time it is told, and an answer depends on its own tokens alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.requests import Request, Sampling
from scheduling.servicetime import EXAMPLE, ServiceTimes
from tests.launch import ROOT
from tests.workers.engine_fakes import job
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.backlog import Backlog
from workers.chat import ChatTemplate
from workers.meter import Meter
from workers.prompts import PromptReader
from workers.protocol import Answer, EngineConfig, EngineLoaded, Frame, FromEngine, Job, Returned
from workers.shape import Shape
from workers.simulated import BOS, EOS, VOCAB, SimulatedContext, SimulatedLibrary, SimulatedModel
from workers.stepper import Stepper, Vocabulary
from workers.supervisor import EngineProcess
from workers.task import Lane, Task
from workers.text import PieceTable

MODEL = SimulatedModel(EXAMPLE)
SHAPED = Shape(steady=True, pad_tokens=8, moves=True, patience=0.6)


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def context(
    time: FakeTime, *, slots: int = 8, batch_tokens: int = 64, times: ServiceTimes = EXAMPLE
) -> SimulatedContext:
    return SimulatedContext(times, slots, 128, batch_tokens, clock=time.clock, sleep=time.sleep)


def give(decoder: SimulatedContext, *rows: tuple[int, int, int], wanted: bool = True) -> None:
    """Decode rows of (sequence, position, token)."""
    for place, (seq, pos, token) in enumerate(rows):
        decoder.seq[place], decoder.pos[place], decoder.token[place] = seq, pos, token
        decoder.wanted[place] = wanted
    assert decoder.decode(len(rows)) == 0


# ---------------------------------------------------------------- time


def test_a_pass_takes_what_is_in_it() -> None:
    time = FakeTime()
    decoder = context(time)
    give(decoder, (0, 0, 7), (1, 0, 7), (1, 1, 7), (1, 2, 7), (3, 0, 7))
    expected = EXAMPLE.pass_s(decode_rows=2, decode_cells=2, read_tokens=3, read_cells=6, chosen=5)
    assert time.slept == [pytest.approx(expected)]


def test_what_the_engines_own_code_takes_is_in_the_times_already() -> None:
    time = FakeTime()
    decoder = context(time)
    give(decoder, (0, 0, 7))
    for position in range(1, 5):
        time.now_s += 0.01
        give(decoder, (0, position, 7))
    whole = sum(EXAMPLE.pass_s(decode_rows=1, decode_cells=n + 1, chosen=1) for n in range(5))
    assert time.now_s == pytest.approx(100.0 + whole)


def test_time_without_work_is_not_made_up_for() -> None:
    time = FakeTime()
    decoder = context(time)
    give(decoder, (0, 0, 7))
    decoder.forget(0)
    time.now_s += 0.01
    give(decoder, (0, 0, 7))
    assert time.slept[1] == pytest.approx(time.slept[0])


def test_a_machine_that_cannot_keep_up_is_late_and_stays_late() -> None:
    time = FakeTime()
    decoder = context(time)
    give(decoder, (0, 0, 7))
    took = time.slept[0]
    time.now_s += 100.0
    give(decoder, (0, 1, 7))
    assert time.slept[1] == pytest.approx(EXAMPLE.decode_cell_s), "at most one pass is made up for"
    give(decoder, (0, 2, 7))
    assert time.slept[2] > took


# ---------------------------------------------------------------- what it says


def test_the_same_tokens_give_the_same_logits_however_they_are_fed() -> None:
    tokens = [5, 99, 300 % VOCAB, 7, 7, 42]
    whole, pieces, single = (context(FakeTime()) for _ in range(3))
    give(whole, *((0, place, token) for place, token in enumerate(tokens)))
    give(pieces, (2, 0, 1), (5, 0, 5), (5, 1, 99))
    give(pieces, *((5, place, tokens[place]) for place in range(2, 6)), (6, 0, 1))
    for place, token in enumerate(tokens):
        give(single, (3, place, token))
    expected = whole.logits(6)[5]
    assert (pieces.logits(5)[3] == expected).all()
    assert (single.logits(1)[0] == expected).all()
    assert not (whole.logits(6)[4] == expected).all()


def test_cells_that_were_taken_back_leave_nothing_behind() -> None:
    decoder, other = context(FakeTime()), context(FakeTime())
    give(decoder, (0, 0, 1), (0, 1, 2), (0, 2, 99), (0, 3, 98))
    decoder.forget(0, 2)
    give(decoder, (0, 2, 3))
    give(other, (4, 0, 1), (4, 1, 2), (4, 2, 3))
    assert (decoder.logits(1)[0] == other.logits(3)[2]).all()


def test_a_moved_sequence_goes_on_as_it_would_have() -> None:
    decoder, other = context(FakeTime()), context(FakeTime())
    give(decoder, (7, 0, 1), (7, 1, 2))
    decoder.copy(7, 2, 2)
    give(decoder, (2, 2, 3))
    give(other, (0, 0, 1), (0, 1, 2), (0, 2, 3))
    assert (decoder.logits(1)[0] == other.logits(3)[2]).all()


def test_a_sequence_that_begins_with_anothers_cells_goes_on_as_it_would_have() -> None:
    decoder, other = context(FakeTime()), context(FakeTime())
    give(decoder, (7, 0, 1), (7, 1, 2), (7, 2, 99))
    decoder.share(7, 2, 2)
    give(decoder, (2, 2, 3))
    give(other, (0, 0, 1), (0, 1, 2), (0, 2, 3))
    assert (decoder.logits(1)[0] == other.logits(3)[2]).all()


class Rig:
    """The real stepper over the simulated context, in no time."""

    def __init__(self, slots: int = 4, batch_tokens: int = 64, shape: Shape = Shape()) -> None:  # noqa: B008
        self.time = FakeTime()
        self.frames: list[Frame] = []
        self.backlog = Backlog()
        self.reader = PromptReader(
            ChatTemplate(None, control_texts=MODEL.control_texts()), MODEL.tokenize, vocab_tokens=VOCAB,
            piece_bytes_max=MODEL.piece_bytes_max(), bos=BOS, ctx_tokens=128, max_tokens_default=16,
        )  # fmt: skip
        self.stepper = Stepper(
            self.backlog.open(Lane.GENERATE), context(self.time, slots=slots, batch_tokens=batch_tokens), slots, 128,
            vocabulary=Vocabulary(MODEL.eog_table(), PieceTable(VOCAB, MODEL.piece)), backlog=self.backlog,
            meter=Meter(lambda stats: None, 0.0), send=self.frames.append, shape=shape, clock=self.time.clock,
        )  # fmt: skip

    def answers(self, *jobs: Job) -> dict[int, Answer]:
        tasks = [Task(one, 0.0) for one in jobs]
        self.backlog.add(tasks)
        for _ in tasks:
            task = self.backlog.next_raw()
            assert task is not None
            task.prompt = self.reader.tokens(task.job.request)
            task.limit = self.reader.limit(task.sampling, task.prompt.size)
            self.backlog.ready(task)
        while self.stepper.step():
            pass
        return {answer.key: answer for frame in self.frames for answer in frame.finished}


def choices(found: dict[int, Answer]) -> dict[int, list[object]]:
    return {key: list(answer.choices) for key, answer in found.items()}


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from([0.0, 1.0])), min_size=1, max_size=10),
    st.sampled_from([Shape(), SHAPED, Shape(steady=True)]),
    st.integers(1, 6),
)
def test_an_answer_does_not_depend_on_what_runs_beside_it(
    work: list[tuple[int, int, float]], shape: Shape, slots: int
) -> None:
    jobs = [
        job(key, tuple((key + n) % VOCAB for n in range(length)), max_tokens=most, temperature=temperature, seed=key)
        for key, (length, most, temperature) in enumerate(work)
    ]
    assert choices(Rig(slots, 32, shape).answers(*jobs)) == choices(Rig(slots=1).answers(*jobs))


@pytest.mark.slow
def test_answers_are_words_that_end_by_themselves() -> None:
    rig = Rig()
    found = rig.answers(*(job(key, (key + 1,), max_tokens=100) for key in range(60)))
    texts = [answer.choices[0].text for answer in found.values()]
    assert all(text.isascii() and set(text) <= set("abcdefghijklmnoprstuvz ") for text in texts)
    assert len(set(texts)) == 60
    reasons = [answer.choices[0].finish_reason for answer in found.values()]
    assert 5 < reasons.count("stop") < 35, "a third of the answers is over before 100 tokens"
    whole = Rig().answers(*(job(key, (key + 1,), max_tokens=100, ignore_eos=True) for key in range(60)))
    assert {answer.choices[0].finish_reason for answer in whole.values()} == {"length"}


def tokens(text: str, *, parse_special: bool = False) -> list[int]:
    return MODEL.tokenize(text, add_special=True, parse_special=parse_special)


def test_a_text_is_a_token_for_four_bytes_and_one_for_each_control_token() -> None:
    assert len(tokens("x" * 400)) == 100
    assert len(tokens("é" * 3)) == 2
    assert tokens("") == []
    assert max(tokens("".join(map(chr, range(1, 2000))))) < VOCAB - 2
    assert tokens("one<|im_end|>two", parse_special=True) == [*tokens("one"), EOS, *tokens("two")]
    assert EOS not in tokens("one<|im_end|>two")


def test_every_byte_of_a_text_counts() -> None:
    text = "What is the capital of France?"
    others = [text[:place] + chr(ord(text[place]) + 1) + text[place + 1 :] for place in range(len(text))]
    assert sum(tokens(other) != tokens(text) for other in others) >= len(others) - 2


def test_control_tokens_have_a_text_and_put_out_none() -> None:
    assert MODEL.token_text(EOS) == "<|im_end|>"
    assert MODEL.piece(EOS) == b""


# ---------------------------------------------------------------- as a process


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    config = EngineConfig(model="none", slots=2, ctx_tokens=256, service_times=EXAMPLE.scaled(0.01))
    started = EngineProcess(config)
    yield started
    started.close(PATIENCE_S)


def answered(said: list[FromEngine]) -> dict[int, Answer]:
    return {answer.key: answer for frame in said if isinstance(frame, Frame) for answer in frame.finished}


@pytest.mark.slow
def test_it_speaks_like_an_engine_and_needs_no_model(engine: EngineProcess) -> None:
    engine.submit([job(key, (key + 1,), stream=key == 0) for key in range(5)])
    said = listen(engine, lambda said: len(answered(said)) == 5)
    loaded = said[0]
    assert isinstance(loaded, EngineLoaded)
    assert (loaded.slots, loaded.vocab_tokens) == (2, VOCAB)
    assert "simulated" in loaded.model_desc
    pieces = "".join(piece.text for frame in said if isinstance(frame, Frame) for piece in frame.pieces)
    assert pieces == answered(said)[0].choices[0].text
    engine.close(PATIENCE_S)
    assert engine.exit_reason() == "exit code 0"


@pytest.mark.slow
def test_it_refuses_embeddings_and_goes_on(engine: EngineProcess) -> None:
    embedding = Request(custom_id="v", kind="embedding", inputs=("a",))
    engine.submit([Job(70, 1, False, embedding), job(71)])
    got = answered(listen(engine, lambda said: answered(said).keys() == {70, 71}))
    assert got[70].error == "a simulated engine generates text, and has no embeddings"
    assert got[71].error is None


@pytest.mark.slow
def test_it_scores_too(engine: EngineProcess) -> None:
    request = Request(
        custom_id="s", kind="completion", prompt=(98, 97), continuations=((100,), (100, 101)), logprobs=0,
        sampling=Sampling(max_tokens=0),
    )  # fmt: skip
    engine.submit([Job(1, 0, False, request)])
    answer = answered(listen(engine, lambda said: bool(answered(said))))[1]
    assert [choice.text for choice in answer.choices] == ["d", "de"]
    first, second = (choice.logprobs for choice in answer.choices)
    assert first is not None
    assert second is not None
    assert second.total < first.total < 0
    engine.close(PATIENCE_S)


@pytest.mark.slow
def test_what_waits_can_be_recalled_and_what_runs_cancelled() -> None:
    slow = EngineProcess(EngineConfig(model="none", slots=1, ctx_tokens=256, service_times=EXAMPLE.scaled(10.0)))
    slow.submit([job(1, max_tokens=200, ignore_eos=True), job(2), job(3)])
    listen(slow, lambda said: any(isinstance(frame, Frame) and frame.started for frame in said))
    slow.recall(5, [1, 3])
    said = listen(slow, lambda said: any(isinstance(message, Returned) for message in said))
    assert Returned(5, [3]) in said
    slow.cancel([1, 2])
    said += listen(slow, lambda new: answered(said + new).keys() >= {1, 2})
    assert [answered(said)[key].choices[0].finish_reason for key in (1, 2)] == ["cancelled", "cancelled"]
    slow.close(PATIENCE_S)


@pytest.mark.slow
def test_it_can_be_killed_like_the_real_one(engine: EngineProcess) -> None:
    listen(engine, lambda said: bool(said))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    listen(engine)
    assert engine.exit_reason() == "killed by SIGKILL"


@pytest.mark.slow
def test_it_loads_no_llama_cpp() -> None:
    code = "import sys, workers.engine, workers.simulated; print('llama_cpp' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]


def test_its_batches_are_shaped_as_they_were_where_it_was_measured() -> None:
    steady = msgspec.structs.replace(EXAMPLE.measured, steady=True)
    on_gpu = msgspec.structs.replace(EXAMPLE, measured=steady)
    assert (SimulatedLibrary(EXAMPLE).gpu_names(), SimulatedLibrary(on_gpu).gpu_names()) == ([], ["simulated"])
    assert (MODEL.model_bytes, MODEL.cell_bytes) == (steady.model_bytes, steady.cell_bytes)


def test_what_is_scored_may_be_as_long_as_a_long_slot() -> None:
    config = EngineConfig(model="none", slots=1, ctx_tokens=4, long_slots=1, long_ctx_tokens=16, batch_tokens=16)
    context = SimulatedModel(EXAMPLE.scaled(0.0)).scoring_context(config, 1, 1, cells=16, outputs=1)
    context.pos[:] = range(16)
    assert context.decode(16) == 0
