"""Speculation in the engine process, over real models. Drafts are checked whether it pays or not: what pays depends on
the machine, what is put out must not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.workers.test_engine import PROMPTS, Session, answers, chat, config, text
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.protocol import Answer, EngineConfig, EngineFailed, FromEngine, Job, Stats

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PASSAGE = (
    "The lighthouse at Cape Varden was built in 1847 by the engineer Tomas Lindqvist. It stands 38 metres high and its "
    "light can be seen from 24 nautical miles. In 1921 the old oil lamp was replaced by an electric one."
)
REPEATING = (
    f"Repeat the following text word for word:\n\n{PASSAGE}",
    f"List every sentence of this text that contains a year, quoting it:\n\n{PASSAGE}",
    f"Summarise this text in two sentences:\n\n{PASSAGE}",
)
REPEATED_TOKENS = 40


def speculating(model: Path, **changes: object) -> EngineConfig:
    """One slot; with flash attention llama.cpp computes a row on the CPU alike, whatever else is in the pass."""
    options = {"flash_attention": True, "speculate": "always"} | changes
    return msgspec.structs.replace(config(model, slots=1), **options)


def asked(engine: EngineConfig, *jobs: Job) -> tuple[dict[int, Answer], list[Stats]]:
    """The answers of an engine of its own, and all that it counted."""
    session = Session(engine)
    got = session.ask(*jobs)
    said: list[FromEngine] = session.said

    def counted(new: list[FromEngine]) -> bool:
        stats = [one for one in said + new if isinstance(one, Stats)]
        return sum(one.output_tokens for one in stats) >= sum(answer.output_tokens for answer in got.values())

    said += listen(session.engine, counted)
    session.engine.close(PATIENCE_S)
    return got, [one for one in said if isinstance(one, Stats)]


def texts(got: dict[int, Answer]) -> list[str]:
    return [text(got[key]) for key in sorted(got)]


def share_accepted(stats: list[Stats]) -> float:
    return sum(one.accepted_tokens for one in stats) / max(1, sum(one.drafted_tokens for one in stats))


@pytest.fixture(scope="module")
def work() -> list[Job]:
    """What repeats its prompt, then the prompts of the other tests."""
    jobs = [chat(key, one, max_tokens=REPEATED_TOKENS) for key, one in enumerate(REPEATING)]
    return jobs + [chat(100 + key, prompt, max_tokens=12) for key, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def plain(real_model: Path, work: list[Job]) -> list[str]:
    got, stats = asked(speculating(real_model, speculate="never"), *work)
    assert sum(one.drafted_tokens for one in stats) == 0
    return texts(got)


@pytest.mark.slow
def test_greedy_answers_are_the_same_with_and_without(real_model: Path, work: list[Job], plain: list[str]) -> None:
    got, stats = asked(speculating(real_model), *work)
    assert texts(got) == plain
    assert sum(one.accepted_tokens for one in stats) > 50


@pytest.mark.slow
def test_answers_that_quote_their_prompt_accept_drafts(real_model: Path, work: list[Job]) -> None:
    got, stats = asked(speculating(real_model, draft_max=7), *work[: len(REPEATING)])
    tokens = sum(answer.output_tokens for answer in got.values())
    assert sum(one.steps for one in stats) < 0.7 * tokens
    assert share_accepted(stats) > 0.3


@pytest.mark.slow
def test_sampled_answers_are_the_same_with_and_without(real_model: Path) -> None:
    jobs = [
        chat(key, REPEATING[key % 3], max_tokens=24, seed=key, temperature=0.7, repeat_penalty=1.0 + 0.1 * (key % 2))
        for key in range(4)
    ]
    expected, _ = asked(speculating(real_model, speculate="never"), *jobs)
    got, stats = asked(speculating(real_model), *jobs)
    assert texts(got) == texts(expected)
    assert sum(one.accepted_tokens for one in stats) > 0


@pytest.mark.slow
@pytest.mark.parametrize("steady", [False, True])
def test_several_sequences_at_once_are_checked_together(real_model: Path, steady: bool) -> None:
    jobs = [chat(key, one, max_tokens=REPEATED_TOKENS - 8 * key) for key, one in enumerate(REPEATING)]
    expected, _ = asked(speculating(real_model, slots=3, steady_batches=steady, speculate="never"), *jobs)
    got, stats = asked(speculating(real_model, slots=3, steady_batches=steady), *jobs)
    # Other rows in a pass change the last bits; a cell in the wrong place changes everything.
    assert sum(one == other for one, other in zip(texts(got), texts(expected), strict=True)) >= 2
    assert sum(one.accepted_tokens for one in stats) > 20


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_nearly_always_right(
    real_model: Path, work: list[Job], plain: list[str]
) -> None:
    got, stats = asked(speculating(real_model, draft_model=str(real_model), draft_max=7), *work[:8])
    assert texts(got) == plain[:8]
    assert share_accepted(stats) > 0.95


@pytest.mark.slow
def test_another_model_may_draft_and_changes_nothing(
    real_model: Path, tiny_model: Path, work: list[Job], plain: list[str]
) -> None:
    got, stats = asked(speculating(real_model, draft_model=str(tiny_model), draft_max=3), *work[:4])
    assert texts(got) == plain[:4]
    assert share_accepted(stats) < 0.2


@pytest.mark.slow
def test_whether_it_pays_is_found_out_and_changes_nothing(real_model: Path, work: list[Job], plain: list[str]) -> None:
    got, _ = asked(speculating(real_model, speculate="auto"), *work[:8])
    assert texts(got) == plain[:8]


@pytest.mark.slow
def test_a_draft_model_that_is_not_there_is_the_users_error(tiny_model: Path, tmp_path: Path) -> None:
    session = Session(speculating(tiny_model, draft_model=str(tmp_path / "none.gguf")))
    (failed,) = session.said
    assert isinstance(failed, EngineFailed)
    assert failed.user_error
    assert "there is no model file" in failed.reason
    assert answers(session.said) == {}
