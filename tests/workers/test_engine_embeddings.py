"""Embeddings from the engine process: random BERTs for each way of pooling, SmolLM2 for a model that also generates.

Every vector is compared with what llama-cpp-python's own `Llama.embed` makes of the same input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from scheduling.requests import Request, Sampling
from scheduling.vectors import from_bytes
from tests.tiny_bert import CTX_TOKENS, POOLING, TINY, build_tiny_bert, words
from tests.workers.test_engine import Session, text
from tests.workers.test_engine import answers as answers_in
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.protocol import Answer, EngineConfig, EngineFailed, EngineLoaded, Job, Returned

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

TEXTS = (
    "What is the capital of France?",
    "a",
    "The quick brown fox jumps over the lazy dog, and the dog does not care. " * 3,
    "12 + 30 = 42!",
    "Summarise: the cat sat on the mat and looked at the moon.",
)
CTX = 256
SAME = 0.9999
"""Cosine from which on two vectors are the same but for rounding."""
SAME_OF_FOUR_BITS = 0.999

# Runs beside the tests: two llama.cpp in one process would share its logger.
REFERENCE = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=int(sys.argv[2]), n_batch=int(sys.argv[2]), n_ubatch=int(sys.argv[2]), n_threads=1,
    n_threads_batch=1, embedding=True, pooling_type=int(sys.argv[3]), verbose=False,
)
json.dump([model.embed(text, normalize=True) for text in json.load(sys.stdin)], sys.stdout)
"""


def reference(model: Path, pooling: str, texts: Sequence[str] = TEXTS) -> npt.NDArray[np.float32]:
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(model), str(CTX), str(POOLING[pooling])],
        input=json.dumps(texts), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return np.array(json.loads(done.stdout), np.float32)


def config(model: Path, **options: object) -> EngineConfig:
    fields: dict[str, object] = {
        "slots": 2, "ctx_tokens": CTX, "batch_tokens": 128, "ubatch_tokens": 128, "threads": 2,
        "lanes_at_start": ("embed",),
    }  # fmt: skip
    return msgspec.convert({"model": str(model)} | fields | options, EngineConfig)


def embed(key: int, *inputs: str | tuple[int, ...], dimensions: int | None = None) -> Job:
    return Job(key, 0, False, Request(custom_id=str(key), kind="embedding", inputs=inputs, dimensions=dimensions))


def in_order(answers: dict[int, Answer]) -> list[Answer]:
    return [answers[key] for key in sorted(answers)]


def vectors(answer: Answer, count: int) -> npt.NDArray[np.float32]:
    assert answer.error is None
    return from_bytes(answer.vectors, count)


def cosines(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of vectors that have length 1 both, row by row."""
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert one.shape == other.shape
    return np.einsum("ij,ij->i", one, other)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random BERTs by how they pool; "" does not say."""
    pytest.importorskip("gguf", reason="the gguf package (extra: test) writes the model")
    folder = tmp_path_factory.mktemp("bert")
    paths = {pooling: folder / f"bert-{pooling or 'none'}.gguf" for pooling in ("mean", "cls", "rank", "")}
    for pooling, path in paths.items():
        build_tiny_bert(path, pooling=pooling or None)
    return paths


@pytest.fixture(scope="module")
def bert(berts: dict[str, Path]) -> Iterator[Session]:
    session = Session(config(berts["mean"]))
    yield session
    session.engine.close(PATIENCE_S)


@pytest.fixture(scope="module")
def smol(real_model: Path) -> Iterator[Session]:
    session = Session(config(real_model))
    yield session
    session.engine.close(PATIENCE_S)


# ---------------------------------------------------------------- the same as llama.cpp's own


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_pools_as_its_file_says(berts: dict[str, Path], pooling: str) -> None:
    session = Session(config(berts[pooling]))
    answer = session.ask(embed(0, *TEXTS))[0]
    session.engine.close(PATIENCE_S)
    same = cosines(vectors(answer, len(TEXTS)), reference(berts[pooling], pooling))
    assert same.min() > SAME, same


@pytest.mark.parametrize(("asked", "pooling"), [(None, "mean"), ("last", "last"), ("cls", "cls")])
def test_a_file_that_does_not_say_is_pooled_as_asked_or_by_the_mean(
    berts: dict[str, Path], asked: str | None, pooling: str
) -> None:
    session = Session(config(berts[""], pooling=asked))
    answer = session.ask(embed(0, *TEXTS))[0]
    session.engine.close(PATIENCE_S)
    assert cosines(vectors(answer, len(TEXTS)), reference(berts[""], pooling)).min() > SAME


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_model_that_generates_has_embeddings_too(real_model: Path, pooling: str) -> None:
    session = Session(config(real_model, pooling=None if pooling == "mean" else pooling, flash_attention=False))
    alone = [session.ask(embed(key, one))[key] for key, one in enumerate(TEXTS)]
    together = session.ask(embed(10, *TEXTS))[10]
    session.engine.close(PATIENCE_S)
    expected = reference(real_model, pooling)
    assert cosines(np.concatenate([vectors(one, 1) for one in alone]), expected).min() > SAME
    # Its weights have four bits, which makes more of rounding.
    assert cosines(vectors(together, len(TEXTS)), expected).min() > SAME_OF_FOUR_BITS


def test_a_model_with_a_cache_gives_the_same_alone_and_together(tiny_model: Path) -> None:
    session = Session(config(tiny_model))
    together = vectors(session.ask(embed(0, *TEXTS))[0], len(TEXTS))
    alone = [vectors(session.ask(embed(key, one))[key], 1) for key, one in enumerate(TEXTS)]
    session.engine.close(PATIENCE_S)
    assert cosines(np.concatenate(alone), together).min() > SAME


# ---------------------------------------------------------------- many at once


def test_what_shares_a_batch_does_not_change_a_vector(bert: Session) -> None:
    random = np.random.default_rng(7)
    texts = [words(random, int(count)) for count in random.integers(1, 90, 300)]
    together = bert.ask(*(embed(key, one) for key, one in enumerate(texts)))
    sample = range(0, 300, 15)
    for key in sample:
        alone = bert.ask(embed(1000 + key, texts[key]))[1000 + key]
        assert cosines(vectors(together[key], 1), vectors(alone, 1)).min() > SAME
    assert together[7].prompt_tokens == len(texts[7].split()) + 2


def test_one_request_may_have_more_inputs_than_a_batch_or_a_context_holds(bert: Session) -> None:
    texts = [f"ab {'cd ' * (key % 5)}" for key in range(700)]
    many = vectors(bert.ask(embed(0, *texts))[0], len(texts))
    one_of_each = vectors(bert.ask(embed(1, *texts[:5]))[1], 5)
    assert cosines(many, np.tile(one_of_each, (140, 1))).min() > SAME


def test_texts_and_their_token_ids_have_the_same_vector(bert: Session) -> None:
    # [CLS] and [SEP] stand around a text; [PAD], [UNK], [CLS], [SEP], [MASK] come first in the vocabulary.
    written, ids = in_order(bert.ask(embed(0, ""), embed(1, (2, 3))))
    assert cosines(vectors(written, 1), vectors(ids, 1)).min() > SAME


def test_the_longest_input_fits_and_one_token_more_is_refused(bert: Session) -> None:
    fits, too_long = in_order(bert.ask(embed(0, "ab " * (CTX - 2)), embed(1, "ab " * (CTX - 1))))
    assert (fits.error, fits.prompt_tokens) == (None, CTX)
    assert f"input[0] has {CTX + 1} tokens, more than the {CTX} that --ctx allows" in (too_long.error or "")


@pytest.mark.parametrize("ctx_tokens", [257, 600, 1000])
def test_the_longest_input_may_have_any_number_of_tokens(tiny_model: Path, ctx_tokens: int) -> None:
    session = Session(config(tiny_model, ctx_tokens=ctx_tokens))
    answer = session.ask(embed(0, (5,) * ctx_tokens, TEXTS[0]))[0]
    session.engine.close(PATIENCE_S)
    assert vectors(answer, 2).any()


def test_no_input_is_longer_than_the_model_has_positions(berts: dict[str, Path]) -> None:
    session = Session(config(berts["mean"], ctx_tokens=4 * CTX_TOKENS))
    fits, too_long = in_order(session.ask(embed(0, (5,) * CTX_TOKENS), embed(1, (5,) * (CTX_TOKENS + 1))))
    session.engine.close(PATIENCE_S)
    assert fits.error is None
    assert f"more than the {CTX_TOKENS} that this model can take" in (too_long.error or "")


@pytest.mark.parametrize("content", ["a\0b", "\x00", "🙂" * 20, "\ufffe\uffff", "[CLS]", " ", "ab" * 40])
def test_strange_inputs_are_embedded(bert: Session, content: str) -> None:
    assert vectors(bert.ask(embed(0, content))[0], 1).shape == (1, TINY.width)


def test_dimensions_cut_a_vector_and_more_than_the_model_has_are_refused(bert: Session) -> None:
    jobs = (embed(0, TEXTS[0]), embed(1, TEXTS[0], dimensions=8), embed(2, TEXTS[0], dimensions=TINY.width + 1))
    whole, cut, too_many = in_order(bert.ask(*jobs))
    first = vectors(whole, 1)[:, :8]
    assert cosines(vectors(cut, 1), first / np.linalg.norm(first)).min() > SAME
    assert f"this model's embeddings have {TINY.width}" in (too_many.error or "")


# ---------------------------------------------------------------- lanes


def test_an_encoder_loads_whatever_was_expected_and_refuses_to_generate(berts: dict[str, Path]) -> None:
    session = Session(config(berts["cls"], lanes_at_start=("generate",)))
    assert isinstance(session.said[0], EngineLoaded)
    asked = Request(custom_id="1", kind="completion", prompt="hello", sampling=Sampling(max_tokens=2))
    answers = session.ask(Job(0, 0, False, asked), embed(1, "hello"))
    session.engine.close(PATIENCE_S)
    assert "is not a model that continues text: it can only be asked for embeddings" in (answers[0].error or "")
    assert answers[1].error is None


def test_a_model_made_ready_for_embeddings_generates_when_it_is_asked_to(smol: Session) -> None:
    asked = Request(
        custom_id="1", kind="completion", prompt="Count: one, two,", sampling=Sampling(max_tokens=4, temperature=0.0)
    )
    first = smol.ask(Job(10, 0, False, asked), embed(11, "between"))
    assert "three" in text(first[10])
    assert first[11].error is None


def test_an_engine_that_only_embeds_takes_more_requests_at_once_than_it_has_slots(bert: Session) -> None:
    (loaded,) = [message for message in bert.said if isinstance(message, EngineLoaded)]
    assert loaded.slots > 100


def test_a_model_that_ranks_is_refused_unless_it_is_told_how_to_pool(berts: dict[str, Path]) -> None:
    session = Session(config(berts["rank"]))
    (failed,) = session.said
    assert isinstance(failed, EngineFailed)
    assert failed.user_error
    assert "is a model that ranks, with no embeddings of its own; --pooling" in failed.reason
    told = Session(config(berts["rank"], pooling="cls"))
    answer = told.ask(embed(0, TEXTS[0]))[0]
    told.engine.close(PATIENCE_S)
    assert answer.error is None


def test_recall_gives_back_inputs_that_have_not_started(bert: Session) -> None:
    keys = list(range(500, 900))
    bert.engine.submit([embed(key, "ab " * 200) for key in keys])
    bert.engine.recall(1, keys[100:])
    said = listen(bert.engine, lambda said: any(isinstance(message, Returned) for message in said))
    (returned,) = [message for message in said if isinstance(message, Returned)]
    got = answers_in(said)
    got |= bert.wait_for(set(keys) - set(returned.keys) - got.keys())
    assert set(got) | set(returned.keys) == set(keys)
    assert not set(got) & set(returned.keys)
