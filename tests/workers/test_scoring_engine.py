"""Scoring by the engine process over real models, against log-softmax of logits from llama.cpp's own Python class."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from scheduling.logprobs import TokenLogprobs, chat_logprobs
from scheduling.requests import Message, Request, Sampling
from tests.tiny_recurrent import build_tiny_recurrent
from tests.workers.test_engine import CTX, Session, config, counted
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.protocol import Answer, Job

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

# Runs beside the tests: two llama.cpp in one process would share its logger. A job is a prompt and what follows it,
# both texts. Logits are wanted of the prompt's last row, or of all where nothing follows, and of all rows after it.
REFERENCE = """
import json, sys
import llama_cpp, numpy
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=int(sys.argv[2]), n_batch=int(sys.argv[2]), n_ubatch=int(sys.argv[2]), n_threads=1,
    n_threads_batch=1, flash_attn=False, logits_all=True, verbose=False,
)
def rows(tokens, past, every):
    model._batch.set_batch(batch=tokens, n_past=past, logits_all=every)
    model._ctx.decode(model._batch)
    count = len(tokens) if every else 1
    logits = numpy.ctypeslib.as_array(model._ctx.get_logits(), (count, model.n_vocab())).astype(numpy.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
found = []
for prompt, after in json.load(sys.stdin):
    tokens = model.tokenize((prompt + after).encode(), add_bos=True, special=False)
    first = len(model.tokenize(prompt.encode(), add_bos=True, special=False)) if after else 1
    model._ctx.kv_cache_clear()
    read = first if after else 0
    known = [rows(tokens[:first], 0, False)] if after else []
    if tokens[read:-1]:
        known.append(rows(tokens[read:-1], read, True))
    known = numpy.concatenate(known)
    targets = tokens[first:]
    found.append({
        "tokens": targets, "logprobs": known[numpy.arange(len(targets)), targets].tolist(),
        "greedy": known.argmax(axis=1).tolist() == targets, "top": numpy.sort(known, axis=1)[:, :-6:-1].tolist(),
    })
json.dump(found, sys.stdout)
"""

CONTEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a princess who lived in a castle with her father, the king, and",
    "def add(a, b):\n    return",
    "The opposite of hot is",
)
CONTINUATIONS = (" Paris", " a hundred degrees", " her mother, the queen.", " a + b\n", " cold", "!", " 東京 é")
TOLERANCE = 1e-4
CHATTER = 1.0
"""Weights are quantised, and so are the numbers that meet them in kernels: a difference in the last bit, as another
shape of a batch or other cells make it, can tip one over. Of SmolLM2's log-probabilities here, flash attention on or
off moves half by 0.16 or more, one by 0.44. A batch of one row, for which there are other kernels, moves one by 0.24.
"""


def reference(model: Path, jobs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each job, a prompt and what follows it: what llama.cpp's logits say of the latter's tokens, or of all."""
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(model), str(CTX)],
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def scoring(key: int, prompt: str | tuple[int, ...], *, max_tokens: int = 0, **fields: Any) -> Job:
    request = Request(
        custom_id=str(key),
        kind="completion",
        prompt=prompt,
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
        **({"logprobs": 0} | fields),
    )
    return Job(key, 0, False, request)


def of(answer: Answer, choice: int = 0) -> TokenLogprobs:
    assert answer.error is None
    packed = answer.choices[choice].logprobs
    assert packed is not None
    return packed


def values(packed: TokenLogprobs) -> npt.NDArray[np.float32]:
    return np.frombuffer(packed.logprobs, np.float32)


@pytest.fixture(scope="module")
def recurrent_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mamba: what a sequence has read cannot be taken back, only copied whole."""
    pytest.importorskip("gguf", reason="the gguf package (extra: test) writes the tiny model")
    path = tmp_path_factory.mktemp("recurrent") / "tiny-mamba.gguf"
    build_tiny_recurrent(real_model, path)
    return path


@pytest.fixture(scope="module", params=["real", "tiny", "recurrent"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_model")
    return path


@pytest.fixture(scope="module")
def session(model: Path) -> Iterator[Session]:
    opened = Session(config(model))
    yield opened
    opened.engine.close(PATIENCE_S)


def differences(packed: TokenLogprobs, expected: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Of what is known of each token."""
    found = values(packed)
    difference: npt.NDArray[np.float64] = np.abs(found[~np.isnan(found)] - np.array(expected["logprobs"]))
    return difference


def alone(model: Path, job: Job) -> Answer:
    """The answer of an engine that has nothing else in its cells: what it computes is what the reference computes."""
    session = Session(config(model))
    answer = session.ask(job)[job.key]
    session.engine.close(PATIENCE_S)
    return answer


def test_a_prompts_log_probabilities_equal_those_from_the_logits(model: Path) -> None:
    prompts = CONTEXTS[1:4]
    worst = 0.0
    for prompt, expected in zip(prompts, reference(model, [(prompt, "") for prompt in prompts]), strict=True):
        answer = alone(model, scoring(1, prompt, echo=True, logprobs=5))
        packed = of(answer)
        assert answer.choices[0].text == prompt
        assert (answer.prompt_tokens, answer.output_tokens) == (values(packed).size, 0)
        assert np.isnan(values(packed)[0])
        top = np.frombuffer(packed.top_logprobs, np.float32).reshape(-1, 5)[1:]
        worst = max(worst, differences(packed, expected).max(), float(np.abs(top - np.array(expected["top"])).max()))
        assert packed.total == pytest.approx(sum(expected["logprobs"]), abs=TOLERANCE)
        assert packed.greedy == expected["greedy"]
    print(f"largest difference {worst:.2g}")
    assert worst < TOLERANCE


def test_a_continuations_log_probabilities_equal_those_from_the_logits(model: Path) -> None:
    jobs = list(zip(CONTEXTS, CONTINUATIONS, strict=False))
    worst, greedy = 0.0, 0
    for job, expected in zip(jobs, reference(model, jobs), strict=True):
        answer = alone(model, scoring(1, job[0], continuations=(job[1],)))
        assert [choice.text for choice in answer.choices] == [job[1]]
        worst = max(worst, differences(of(answer), expected).max())
        assert of(answer).total == pytest.approx(sum(expected["logprobs"]), abs=TOLERANCE)
        assert of(answer).greedy == expected["greedy"]
        greedy += expected["greedy"]
    print(f"largest difference {worst:.2g}, {greedy} of {len(jobs)} greedy")
    assert worst < TOLERANCE


def test_many_at_once_equal_the_logits_but_for_rounding(session: Session, model: Path) -> None:
    jobs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    got = session.ask(*(scoring(200 + key, text, continuations=CONTINUATIONS) for key, text in enumerate(CONTEXTS)))
    choices = [of(got[200 + key], place) for key in range(len(CONTEXTS)) for place in range(len(CONTINUATIONS))]
    found = [differences(*pair).max() for pair in zip(choices, reference(model, jobs), strict=True)]
    print(f"differences: median {np.median(found):.2g}, largest {max(found):.2g}")
    assert np.median(found) < CHATTER / 10
    assert max(found) < CHATTER


def test_the_prompt_of_many_continuations_is_computed_once(tiny_model: Path) -> None:
    session = Session(config(tiny_model))
    prompt, continuations = tuple(range(100, 200)), tuple((300 + k, 5, 6) for k in range(20))
    answer = session.ask(scoring(1, prompt, continuations=continuations))[1]
    assert (answer.prompt_tokens, answer.output_tokens) == (100 + 20 * 3, 0)
    # What comes last in a continuation says nothing of what is asked.
    wanted = 100 + 20 * 2
    session.said += listen(session.engine, lambda new: counted(session.said + new)[0] >= wanted)
    session.engine.close(PATIENCE_S)
    session.said += listen(session.engine) + session.engine.poll()
    assert counted(session.said) == (wanted, 0)


def test_choices_of_one_question_as_requests_of_their_own_share_its_tokens(tiny_model: Path) -> None:
    """As lm-evaluation-harness sends them: token ids, echo, and one token more than it wants."""
    session = Session(config(tiny_model))
    question = tuple(range(100, 200))
    jobs = [scoring(k, (*question, 300 + k, 5), max_tokens=1, echo=True, logprobs=1) for k in range(8)]
    got = session.ask(*jobs)
    session.engine.close(PATIENCE_S)
    session.said += listen(session.engine) + session.engine.poll()
    # Of the last token that they share the row is needed again.
    assert counted(session.said) == (102 + 7 * 3, 8)
    again = Session(config(tiny_model))
    for job in jobs:
        expected, found = of(again.ask(msgspec.structs.replace(job, key=50 + job.key))[50 + job.key]), of(got[job.key])
        assert values(found).size == 103
        assert np.abs(values(found) - values(expected))[1:].max() < CHATTER / 10
    again.engine.close(PATIENCE_S)


def test_the_output_has_its_log_probabilities_and_they_change_nothing(real_model: Path) -> None:
    session = Session(config(real_model, slots=2))
    question = (Message("user", "What is the capital of France?"),)
    sampling = Sampling(max_tokens=12, temperature=0.0, repeat_penalty=1.3)
    plain = Request(custom_id="p", kind="chat", messages=question, sampling=sampling)
    asking = msgspec.structs.replace(plain, logprobs=3)
    first = session.ask(Job(1, 0, False, plain))[1]
    second = session.ask(Job(2, 0, False, asking))[2]
    session.engine.close(PATIENCE_S)
    assert first.choices[0].text == second.choices[0].text
    assert first.choices[0].logprobs is None
    content = chat_logprobs(of(second)).content
    assert len(content) == second.output_tokens
    text = b"".join(bytes(token.bytes or []) for token in content)
    assert text.decode() == second.choices[0].text
    for token in content:
        top = [one.logprob or 0.0 for one in token.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert token.logprob is not None
        assert token.logprob <= top[0] <= 0
    if second.choices[0].finish_reason == "stop":
        assert (content[-1].token, content[-1].bytes) == ("<|im_end|>", None)


def test_generating_and_scoring_run_beside_each_other(session: Session) -> None:
    jobs = [scoring(700 + k, "A b c", continuations=(" d", " e f")) for k in range(6)]
    made = [Job(800 + k, 0, False, Request(custom_id="g", kind="completion", prompt=f"{k}")) for k in range(6)]
    got = session.ask(*(job for pair in zip(jobs, made, strict=True) for job in pair))
    assert all(answer.error is None for answer in got.values())
    totals = [of(got[700 + k], 1).total for k in range(6)]
    assert max(totals) - min(totals) < CHATTER / 10


def test_what_cannot_be_scored_fails_alone(session: Session) -> None:
    got = session.ask(
        scoring(900, "word " * 300, echo=True),
        scoring(901, (1, 2), continuations=((3,), (10**6,))),
        scoring(902, (1,) * 250, continuations=((3,) * 7,)),
        scoring(903, (1, 2), echo=True),
    )
    assert "--ctx" in (got[900].error or "")
    assert "continuations[1]: token 1000000" in (got[901].error or "")
    assert "--ctx 257" in (got[902].error or "")
    assert got[903].error is None
