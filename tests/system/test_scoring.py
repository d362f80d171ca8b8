"""Log-probabilities as a person asks for them: in a file for `llmpi batch`, and from `llmpi infer`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.launch import Launcher, run_alone
from tests.system.runs import Line, Run, check_one_clear_line, check_ranks_add_up, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]

QUESTIONS = ("The capital of France is", "The opposite of hot is", "Two and two make")
ANSWERS = (" Paris", " cold", " four")


def lines() -> list[Line]:
    """Each question with all answers as continuations, and each pair as a request of its own, as evaluations do."""
    together: list[Line] = [
        {"custom_id": f"q{k}", "prompt": question, "continuations": list(ANSWERS), "logprobs": 1}
        for k, question in enumerate(QUESTIONS)
    ]
    apart: list[Line] = [
        {
            "custom_id": f"q{k}-a{j}", "method": "POST", "url": "/v1/completions",
            "body": {"prompt": question + answer, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0},
        }
        for k, question in enumerate(QUESTIONS)
        for j, answer in enumerate(ANSWERS)
    ]  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    return [*together, *apart, {"custom_id": "chat", **chat}]


@pytest.mark.mpi
def test_a_file_is_scored_on_three_ranks(mpirun: Launcher, real_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", lines())
    run = Run(tmp_path / "run")
    done = mpirun(3, "batch", "-m", real_model, "-i", given, "-o", run.path, "--ctx", 256, "--slots", 4)
    assert done.rc == 0, done.output
    run.check_whole([line["custom_id"] for line in lines()])
    check_ranks_add_up(run)
    found = {name: line["response"]["body"] for name, line in run.by_id().items()}
    for k in range(len(QUESTIONS)):
        choices = found[f"q{k}"]["choices"]
        assert [choice["text"] for choice in choices] == list(ANSWERS)
        for j, choice in enumerate(choices):
            known = choice["logprobs"]["token_logprobs"]
            assert choice["llmpi"]["logprob"] == pytest.approx(sum(known), abs=1e-5)
            whole = found[f"q{k}-a{j}"]["choices"][0]
            assert whole["text"].startswith(QUESTIONS[k] + ANSWERS[j])
            assert whole["logprobs"]["token_logprobs"][0] is None
            # The last token is the one that was asked for beyond the prompt.
            assert sum(whole["logprobs"]["token_logprobs"][-1 - len(known) : -1]) == pytest.approx(sum(known), abs=1.0)
        assert max(range(3), key=lambda j: choices[j]["llmpi"]["logprob"]) == k, "the right answer is the likeliest"
    content = found["chat"]["choices"][0]["logprobs"]["content"]
    assert len(content) == found["chat"]["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def test_infer_says_how_likely_texts_are(tiny_model: Path) -> None:
    options = (
        "infer",
        "-m",
        tiny_model,
        "-p",
        "one two",
        "--ctx",
        128,
        "--continuation",
        " three",
        "--continuation",
        " x",
    )
    done = run_alone(*options)
    assert done.rc == 0, done.output
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [json.loads(row[1].removeprefix("greedy").strip()) for row in rows] == [" three", " x"]
    assert all(-60 < float(row[0]) < 0 for row in rows)
    told = json.loads(run_alone(*options, "--json", "--logprobs", 3).stdout)
    assert [f"{score['logprob']:.6f}" for score in told["scores"]] == [row[0] for row in rows]
    assert all(len(table) >= 3 for table in told["logprobs"][0]["top_logprobs"])


def test_infer_scores_a_prompt_as_continuations_do(tiny_model: Path) -> None:
    options = ("infer", "-m", tiny_model, "--ctx", 128, "--json")
    echo = ("--raw", "--echo", "--max-tokens", 0, "--logprobs", 1)
    told = json.loads(run_alone(*options, "-p", "one two three four", *echo).stdout)
    assert (told["text"], told["output_tokens"]) == ("one two three four", 0)
    known = told["logprobs"][0]["token_logprobs"]
    assert known[0] is None
    given = json.loads(run_alone(*options, "-p", "one", "--continuation", " two three four").stdout)
    assert given["scores"][0]["logprob"] == pytest.approx(sum(known[1:]), abs=0.01)


def test_infer_tells_log_probabilities_of_its_answer(tiny_model: Path) -> None:
    options = ("infer", "-m", tiny_model, "-p", "hello", "--max-tokens", 3, "--ctx", 128, "--logprobs", 1)
    told = json.loads(run_alone(*options, "--json").stdout)
    content = told["logprobs"][0]["content"]
    assert len(content) == 3
    assert all(math.exp(token["logprob"]) <= 1 and len(token["top_logprobs"]) == 1 for token in content)
    check_one_clear_line(run_alone(*options), 2, "--logprobs", "--json")
