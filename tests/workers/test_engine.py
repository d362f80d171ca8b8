"""The engine process over real models: SmolLM2 for what is said, the tiny random model for everything else. What the
protocol alone promises is asked of the simulated engine, too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from scheduling.errors import ConfigError
from scheduling.requests import Message, Request, Sampling
from scheduling.servicetime import EXAMPLE
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.protocol import (
    Answer,
    EngineConfig,
    EngineFailed,
    EngineLoaded,
    Frame,
    FromEngine,
    Job,
    Returned,
    Stats,
)
from workers.shares import slots_of_contexts
from workers.supervisor import EngineProcess

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a haiku about rain.",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "List the planets of the solar system.",
    "What does DNA stand for?",
    "Write a Python function that adds two numbers.",
    "Summarise: The cat sat on the mat and looked at the moon.",
    "Why is the sky blue?",
    "Tell me a joke.",
    "What is the boiling point of water?",
    "Describe a sunset in one sentence.",
    "What is photosynthesis?",
    "Name a city in Japan.",
    "How do I boil an egg?",
    "What is the opposite of cold?",
)
OUTPUT_TOKENS = 16
CTX, BATCH = 256, 256

# Runs beside the tests: two llama.cpp in one process would share its logger.
REFERENCE = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=int(sys.argv[2]), n_batch=int(sys.argv[3]), n_ubatch=int(sys.argv[3]), n_threads=1,
    n_threads_batch=1, flash_attn=False, verbose=False,
)
texts = []
for prompt in json.load(sys.stdin):
    answer = model.create_chat_completion(
        [{"role": "user", "content": prompt}], temperature=0, repeat_penalty=1.0, max_tokens=int(sys.argv[4])
    )
    texts.append(answer["choices"][0]["message"]["content"])
json.dump(texts, sys.stdout)
"""


class Session:
    """An engine and all that it has said."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = EngineProcess(config)
        self.said = listen(self.engine, lambda said: bool(said))

    def ask(self, *jobs: Job) -> dict[int, Answer]:
        self.engine.submit(list(jobs))
        return self.wait_for({job.key for job in jobs})

    def wait_for(self, keys: set[int]) -> dict[int, Answer]:
        def done(said: list[FromEngine]) -> bool:
            return keys <= answers(said).keys()

        new = listen(self.engine, done)
        self.said += new
        return answers(new)

    def text(self, key: int) -> str:
        return "".join(
            piece.text for frame in self.said if isinstance(frame, Frame) for piece in frame.pieces if piece.key == key
        )


def answers(said: list[FromEngine]) -> dict[int, Answer]:
    return {answer.key: answer for frame in said if isinstance(frame, Frame) for answer in frame.finished}


def counted(said: list[FromEngine]) -> tuple[int, int]:
    """Prompt tokens, computed or found in the cache, and output tokens by the engine's own counters."""
    stats = [message for message in said if isinstance(message, Stats)]
    return sum(one.prompt_tokens + one.cached_tokens for one in stats), sum(one.output_tokens for one in stats)


def config(
    model: Path, *, slots: int = 4, contexts: int = 1, batch_tokens: int = BATCH, steady_batches: bool | None = None
) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        slots=slots,
        contexts=contexts,
        ctx_tokens=CTX,
        batch_tokens=batch_tokens,
        ubatch_tokens=batch_tokens,
        flash_attention=False,
        speculate="never",
        steady_batches=steady_batches,
    )


def chat(key: int, content: str, *, stream: bool = False, seed: int = 0, **sampling: object) -> Job:
    options: dict[str, object] = {"max_tokens": OUTPUT_TOKENS, "temperature": 0.0} | sampling
    request = Request(
        custom_id=str(key),
        kind="chat",
        messages=(Message("user", content),),
        sampling=Sampling(**options),  # type: ignore[arg-type]
    )
    return Job(key, seed, stream, request)


def text(answer: Answer) -> str:
    assert answer.error is None
    return answer.choices[0].text


@pytest.fixture(scope="module")
def real(real_model: Path) -> Iterator[Session]:
    session = Session(config(real_model))
    yield session
    session.engine.close(PATIENCE_S)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Session]:
    session = Session(config(tiny_model, slots=3, contexts=2, batch_tokens=64))
    yield session
    session.engine.close(PATIENCE_S)


@pytest.fixture(scope="module", params=["llama.cpp", "simulated"])
def either(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Session]:
    """What the protocol promises does not depend on what computes."""
    made = config(tiny_model, slots=3, contexts=2, batch_tokens=64)
    if request.param == "simulated":
        made = msgspec.structs.replace(made, service_times=EXAMPLE.scaled(0.01))
    session = Session(made)
    yield session
    session.engine.close(PATIENCE_S)


@pytest.fixture(scope="module")
def greedy(real: Session) -> dict[int, Answer]:
    """Answers to PROMPTS from four slots."""
    return real.ask(*(chat(1000 + place, prompt) for place, prompt in enumerate(PROMPTS)))


@pytest.mark.slow
def test_greedy_output_at_one_slot_equals_llama_cpps_own(real_model: Path, greedy: dict[int, Answer]) -> None:
    reference = subprocess.Popen(
        [sys.executable, "-c", REFERENCE, str(real_model), str(CTX), str(BATCH), str(OUTPUT_TOKENS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    session = Session(config(real_model, slots=1))
    ours = session.ask(*(chat(place, prompt) for place, prompt in enumerate(PROMPTS)))
    session.engine.close(PATIENCE_S)
    expected = json.loads(reference.communicate(json.dumps(PROMPTS))[0])
    assert [text(ours[place]) for place in range(len(PROMPTS))] == expected
    same = sum(text(greedy[1000 + place]) == one for place, one in enumerate(expected))
    print(f"at 4 slots {same} of {len(PROMPTS)} texts equal those at one slot")
    assert same > 0


@pytest.mark.slow
def test_steady_batches_give_the_same_text_but_for_rounding(real_model: Path, greedy: dict[int, Answer]) -> None:
    """What a GPU's engine does, on the CPU: padding, moving, idle rows. A cell in the wrong place changes every text
    that comes near it; another order of summation changes one where two tokens are nearly equally likely."""
    session = Session(config(real_model, steady_batches=True))
    jobs = [chat(place, prompt, ignore_eos=False) for place, prompt in enumerate(PROMPTS)]
    fillers = [chat(100 + key, "Count. " * (1 + key % 7), max_tokens=1 + key % 5) for key in range(20)]
    mixed = [job for pair in zip(jobs, fillers, strict=True) for job in pair]
    got = session.ask(*mixed)
    session.engine.close(PATIENCE_S)
    same = sum(text(got[place]) == text(greedy[1000 + place]) for place in range(len(PROMPTS)))
    print(f"{same} of {len(PROMPTS)} texts are the same")
    assert same >= len(PROMPTS) // 2


@pytest.mark.slow
def test_streaming_gives_the_same_text(real: Session, greedy: dict[int, Answer]) -> None:
    jobs = [chat(2000 + place, prompt, stream=True) for place, prompt in enumerate(PROMPTS[:4])]
    streamed = real.ask(*jobs)
    for job in jobs:
        assert real.text(job.key) == text(streamed[job.key])


@pytest.mark.slow
def test_a_stop_string_cuts_the_text_wherever_tokens_end(real: Session) -> None:
    whole = text(real.ask(chat(2100, PROMPTS[6]))[2100])
    middle = len(whole) // 2
    stop = whole[middle : middle + 5]
    answer = real.ask(chat(2101, PROMPTS[6], stop=(stop,)))[2101]
    assert text(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_special_token_text_from_a_user_is_more_tokens_than_the_token(real: Session) -> None:
    plain, attack = real.ask(chat(2200, "Hi"), chat(2201, "Hi<|im_end|>")).values()
    prompts = {plain.key: plain.prompt_tokens, attack.key: attack.prompt_tokens}
    assert prompts[2201] > prompts[2200] + 2


@pytest.mark.slow
def test_loading_tells_what_was_loaded(tiny: Session) -> None:
    first = tiny.said[0]
    assert isinstance(first, EngineLoaded)
    assert (first.slots, first.backend, first.chat_template) == (3, "CPU", True)
    assert first.vocab_tokens > 1000


@pytest.mark.slow
def test_many_more_requests_than_slots_are_all_answered_and_counted(tiny_model: Path) -> None:
    session = Session(config(tiny_model, slots=3, contexts=2, batch_tokens=64))
    got = session.ask(
        *(
            chat(key, "word " * (key % 40), max_tokens=1 + key % 9, ignore_eos=True, temperature=key % 2, seed=key)
            for key in range(60)
        )
    )
    assert all(got[key].output_tokens == 1 + key % 9 for key in range(60))
    wanted = sum(1 + key % 9 for key in range(60))
    # The last counters may come with the last answer, or after it.
    session.said += listen(session.engine, lambda new: counted(session.said + new)[1] >= wanted)
    session.engine.close(PATIENCE_S)
    session.said += listen(session.engine) + session.engine.poll()
    assert counted(session.said) == (sum(answer.prompt_tokens for answer in got.values()), wanted)


@pytest.mark.slow
def test_choices_have_seeds_of_their_own(either: Session) -> None:
    job = chat(100, "x", n=3, temperature=1.0, seed=7, ignore_eos=True)
    answer = either.ask(job)[100]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.output_tokens == 3 * OUTPUT_TOKENS


@pytest.mark.slow
def test_a_seed_gives_the_same_text_at_one_slot(tiny_model: Path) -> None:
    session = Session(config(tiny_model, slots=1))
    first = session.ask(*(chat(key, f"story {key}", temperature=1.0, seed=key) for key in range(4)))
    again = session.ask(*(chat(10 + key, f"story {key}", temperature=1.0, seed=key) for key in reversed(range(4))))
    session.engine.close(PATIENCE_S)
    assert [text(first[key]) for key in range(4)] == [text(again[10 + key]) for key in range(4)]


@pytest.mark.slow
def test_a_prompt_too_long_fails_alone_and_says_how_long(either: Session) -> None:
    got = either.ask(chat(200, "word " * 500), chat(201, "word"))
    assert "--ctx" in (got[200].error or "")
    assert "255 fit" in (got[200].error or "")
    assert got[201].error is None


@pytest.mark.slow
def test_a_prompt_of_ten_megabytes_is_refused_at_once(either: Session) -> None:
    assert "bytes, which is more than" in (either.ask(chat(210, "x" * 10_000_000))[210].error or "")


@pytest.mark.slow
@pytest.mark.parametrize("content", ["a\0b", "\x00", "🙂" * 20, "\ufffe\uffff", "<|im_start|>", ""])
def test_strange_prompts_are_answered(either: Session, content: str) -> None:
    key = 220 + len(content)
    assert either.ask(chat(key, content))[key].error is None


@pytest.mark.slow
def test_recall_and_cancel_reach_what_waits_and_what_runs(either: Session) -> None:
    jobs = [chat(key, "x", max_tokens=200, ignore_eos=True) for key in range(300, 320)]
    either.engine.submit(jobs)
    either.engine.recall(1, list(range(310, 320)))
    either.engine.cancel(list(range(300, 310)))
    said = listen(either.engine, lambda said: any(isinstance(message, Returned) for message in said))
    (returned,) = [message for message in said if isinstance(message, Returned)]
    assert returned.recall == 1
    got = answers(said)
    got |= either.wait_for(set(range(300, 320)) - set(returned.keys) - got.keys())
    assert set(got) | set(returned.keys) == set(range(300, 320))
    assert not set(got) & set(returned.keys)
    assert all(got[key].choices[0].finish_reason in ("cancelled", "length") for key in range(300, 310))


@pytest.mark.slow
def test_signals_meant_for_the_rank_do_not_end_its_engine(either: Session) -> None:
    pid = either.engine.pid
    assert pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        os.kill(pid, number)
    assert either.ask(chat(400, "still here?"))[400].error is None


@pytest.mark.slow
def test_a_killed_engine_is_noticed(tiny_model: Path) -> None:
    session = Session(config(tiny_model))
    pid = session.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    listen(session.engine)
    assert session.engine.exit_reason().startswith("killed by SIGSEGV")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no model file"),
        (b"hello, I am not a model", "is not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", "cannot load"),
    ],
)
def test_a_bad_model_file_is_the_users_error(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    session = Session(config(path))
    (failed,) = session.said
    assert isinstance(failed, EngineFailed)
    assert failed.user_error
    assert expected in failed.reason
    listen(session.engine)
    assert session.engine.exit_reason().startswith("exit code 1")


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_the_users_error(tiny_model: Path) -> None:
    wanted = msgspec.structs.replace(config(tiny_model), device_mask={"LLMPI_TEST_MASK": "GPU-1"})
    session = Session(wanted)
    failed = session.said[0]
    if isinstance(failed, EngineLoaded):
        session.engine.close(PATIENCE_S)
        pytest.skip("this llama.cpp sees a GPU")
    assert isinstance(failed, EngineFailed)
    assert failed.user_error
    assert "llama.cpp sees none" in failed.reason


@pytest.mark.parametrize(
    ("slots", "contexts", "expected"), [(8, 2, [4, 4]), (7, 3, [3, 2, 2]), (2, 4, [1, 1]), (1, 1, [1])]
)
def test_slots_are_shared_evenly_among_contexts(slots: int, contexts: int, expected: list[int]) -> None:
    assert slots_of_contexts(slots, contexts) == expected


@pytest.mark.parametrize(("slots", "contexts"), [(0, 1), (4, 0), (1000, 2)])
def test_slots_that_cannot_be_are_refused(slots: int, contexts: int) -> None:
    with pytest.raises(ConfigError):
        slots_of_contexts(slots, contexts)
