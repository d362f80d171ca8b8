"""What options of the engine do to its answers and its memory, on a tiny and on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from scheduling.requests import Request, Sampling
from tests.adapters import random_pair, write_adapter
from tests.tiny_model import FEED_FORWARD, WIDTH, build_tiny_model
from tests.workers.test_engine import PROMPTS, Session, chat, text
from tests.workers.test_supervisor import PATIENCE_S
from workers.protocol import Adapter, Answer, EngineConfig, EngineFailed, Job

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

OUTPUT_TOKENS = 12


def completion(key: int, prompt: tuple[int, ...], max_tokens: int = OUTPUT_TOKENS) -> Job:
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Job(key, 0, False, Request(custom_id=str(key), kind="completion", prompt=prompt, sampling=sampling))


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(100 + (17 * place + seed) % 5000 for place in range(count))


def started(model: Path, **options: Any) -> Session:
    asked: dict[str, Any] = {"slots": 1, "ctx_tokens": 256, "batch_tokens": 128, "ubatch_tokens": 128} | options
    return Session(EngineConfig(model=str(model), threads=1, **asked))


def answered(model: Path, *jobs: Job, **options: Any) -> dict[int, Answer]:
    session = started(model, **options)
    found = session.ask(*jobs)
    session.engine.close(PATIENCE_S)
    return found


def resident_bytes(session: Session) -> int:
    return int(psutil.Process(session.engine.pid).memory_info().rss)


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    down = random_pair(FEED_FORWARD, WIDTH, gain=4.0)
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a.gguf", {"blk.1.ffn_down.weight": down})


@pytest.mark.slow
def test_an_adapter_changes_the_text_and_with_a_scale_of_0_does_not(tiny_model: Path, adapter: Path) -> None:
    jobs = [completion(key, tokens(20, key)) for key in range(4)]

    def texts(*loras: Adapter, **options: Any) -> list[str]:
        got = answered(tiny_model, *jobs, loras=loras, **options)
        return [text(got[key]) for key in range(len(jobs))]

    plain = texts()
    changed = texts(Adapter(str(adapter)))
    assert all(one != other for one, other in zip(plain, changed, strict=True))
    assert texts(Adapter(str(adapter), 0.0)) == plain
    assert texts(Adapter(str(adapter)), Adapter(str(adapter), -1.0)) == plain
    assert texts(Adapter(str(adapter)), slots=2, contexts=2) == changed


@pytest.mark.slow
def test_an_adapter_that_llama_cpp_refuses_is_the_users_error(tiny_model: Path, tmp_path: Path) -> None:
    wrong = write_adapter(tmp_path / "a.gguf", {"blk.0.attn_q.weight": random_pair(32, 64)})
    (failed,) = started(tiny_model, loras=(Adapter(str(wrong)),)).said
    assert isinstance(failed, EngineFailed)
    assert failed.user_error
    assert "cannot load the adapter" in failed.reason


# ---------------------------------------------------------------- caches and positions


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("q8_0", 34 / 64), ("q4_0", 18 / 64)])
def test_quantised_caches_take_less_memory_and_say_nearly_the_same(real_model: Path, kind: str, share: float) -> None:
    jobs = [chat(key, prompt, max_tokens=8) for key, prompt in enumerate(PROMPTS[:6])]
    sessions = {
        name: started(real_model, ctx_tokens=8192, flash_attention=True, cache_type_k=name, cache_type_v=name)
        for name in ("f16", kind)
    }
    got = {name: session.ask(*jobs) for name, session in sessions.items()}
    taken = {name: resident_bytes(session) for name, session in sessions.items()}
    for session in sessions.values():
        session.engine.close(PATIENCE_S)
    # 30 layers, 3 heads of 64: 8192 tokens take 189 MB in 16 bits.
    saved = 8192 * 2 * 2 * 30 * 3 * 64 * (1 - share)
    assert taken["f16"] - taken[kind] == pytest.approx(saved, rel=0.2)
    same = sum(text(got["f16"][key])[:12] == text(got[kind][key])[:12] for key in range(len(jobs)))
    print(f"{kind}: {same} of {len(jobs)} texts begin alike")
    assert same >= (5 if kind == "q8_0" else 2)


@pytest.mark.slow
def test_scaled_positions_let_a_model_run_beyond_what_it_was_trained_with(real_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "short.gguf"
    build_tiny_model(real_model, path, ctx_tokens=256)
    job = completion(0, tokens(400))

    def said(**options: Any) -> str:
        return text(answered(path, job, ctx_tokens=512, **options)[0])

    linear = said(rope_scaling="linear", rope_scale=2.0)
    yarn = said(rope_scaling="yarn", rope_scale=2.0)
    base = said(rope_freq_base=50_000.0)
    assert len({linear, yarn, base, said()}) == 4
    assert said(rope_scaling="none") == said()


# ---------------------------------------------------------------- long slots


@pytest.mark.slow
def test_long_requests_are_answered_beside_short_ones_as_if_alone(tiny_model: Path) -> None:
    long = completion(0, tokens(600))
    short = [completion(key, tokens(5 + key % 40, key)) for key in range(1, 30)]
    alone = answered(tiny_model, long, *short, ctx_tokens=1024)
    beside = answered(tiny_model, *short[:10], long, *short[10:], long_slots=1, long_ctx_tokens=1024)
    for key in range(30):
        assert text(beside[key]) == text(alone[key])


@pytest.mark.slow
def test_an_answer_that_may_become_long_is_a_long_request(tiny_model: Path) -> None:
    got = answered(tiny_model, completion(0, tokens(20), max_tokens=300), long_slots=2, long_ctx_tokens=512)
    assert got[0].output_tokens == 300
    assert answered(tiny_model, completion(0, tokens(20), max_tokens=300))[0].output_tokens == 236


@pytest.mark.slow
def test_what_fits_no_slot_fails_alone_with_what_would(tiny_model: Path) -> None:
    jobs = completion(0, tokens(2000)), completion(1, tokens(20)), completion(2, tokens(700))
    got = answered(tiny_model, *jobs, long_slots=2, long_ctx_tokens=1024)
    assert "the prompt has 2000 tokens" in str(got[0].error)
    assert "--ctx 2001" in str(got[0].error)
    assert got[1].error is None
    assert got[2].error is None


@pytest.mark.slow
def test_long_slots_take_memory_when_the_first_request_needs_them(tiny_model: Path) -> None:
    session = started(tiny_model, long_slots=8, long_ctx_tokens=8192)
    session.ask(completion(0, tokens(20)))
    before = resident_bytes(session)
    session.ask(completion(1, tokens(300)))
    taken = resident_bytes(session) - before
    session.engine.close(PATIENCE_S)
    assert taken > 8 * 8192 * 2 * 2 * 2 * 32
