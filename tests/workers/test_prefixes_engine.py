"""Prefix reuse in the engine process, over llama.cpp: what is in cells is not computed again, and what is said is as
if it were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from scheduling.requests import Message, Request, Sampling
from tests.tiny_model import build_tiny_model
from tests.workers.test_engine import Session, config, text
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.protocol import Answer, EngineConfig, Job, Stats

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

SYSTEM = (
    "You are the keeper of the lighthouse at Cape Varden, which was built in 1847 and is 38 metres high. You answer in "
    "one short sentence, you are polite to everybody, and you never speak of the sea. Here is what you know of it: the "
    "lamp was replaced in 1921, the stairs have 201 steps, and the last keeper left the house in 1974."
)
QUESTIONS = (
    "How many steps do the stairs have?",
    "How high is the lighthouse?",
    "How many rooms does it have?",
    "When was the lamp replaced?",
    "When did the last keeper leave, and why?",
    "Who built it?",
)
OUTPUT_TOKENS = 12


def asked(key: int, *messages: Message, n: int = 1) -> Job:
    sampling = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0, n=n)
    return Job(key, 0, False, Request(custom_id=str(key), kind="chat", messages=messages, sampling=sampling))


def rounds(said: dict[int, Answer]) -> Iterator[list[Job]]:
    """Requests that come together, then one by one, then conversations that go on, then three choices of one prompt."""
    system = Message("system", SYSTEM)
    questions = [(system, Message("user", question)) for question in QUESTIONS]
    yield [asked(key, *messages) for key, messages in enumerate(questions)]
    for key in range(2):
        yield [asked(10 + key, system, Message("user", QUESTIONS[key] + " Be exact."))]
    yield [
        asked(20 + key, *questions[key], Message("assistant", text(said[key])), Message("user", "Are you sure?"))
        for key in range(4)
    ]
    yield [asked(30, *questions[0], n=3)]


def played(engine: EngineConfig, said: dict[int, Answer] | None = None) -> tuple[dict[int, Answer], list[Stats]]:
    """Answers, and what was counted. `said`: the answers that conversations go on from, this engine's own if None."""
    session = Session(engine)
    got: dict[int, Answer] = {}
    for jobs in rounds(got if said is None else said):
        got |= session.ask(*jobs)
    session.engine.close(PATIENCE_S)
    session.said += listen(session.engine) + session.engine.poll()
    assert [answer.error for answer in got.values() if answer.error] == []
    return got, [one for one in session.said if isinstance(one, Stats)]


def texts(got: dict[int, Answer]) -> list[list[str]]:
    return [[choice.text for choice in got[key].choices] for key in sorted(got)]


@pytest.fixture(scope="module")
def model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not quantised: passes of another shape change nothing that decides."""
    pytest.importorskip("gguf", reason="the gguf package (extra: test) writes the tiny model")
    path = tmp_path_factory.mktemp("prefixes") / "tiny.gguf"
    build_tiny_model(real_model, path, quantised=False)
    return path


@pytest.mark.parametrize("steady", [False, True], ids=["CPU", "GPU"])
def test_answers_are_those_of_an_engine_that_reuses_nothing(model: Path, steady: bool) -> None:
    plain = msgspec.structs.replace(config(model, slots=3, steady_batches=steady), ctx_tokens=512, prefix_reuse=False)
    expected, computed = played(plain)
    assert sum(one.cached_tokens for one in computed) == sum(answer.cached_tokens for answer in expected.values()) == 0
    found, saved = played(msgspec.structs.replace(plain, prefix_reuse=True), expected)
    every, read = (sum(one.prompt_tokens for one in stats) for stats in (computed, saved))
    assert read + sum(one.cached_tokens for one in saved) == every
    assert read < every / 3
    assert all(found[key].cached_tokens > 50 for key in found if key >= 10), "all that came later begin like others"
    print(f"{read} of {every} prompt tokens computed")
    assert texts(found) == texts(expected)
