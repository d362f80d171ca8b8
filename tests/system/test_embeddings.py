"""Embeddings as a person asks for them: in a batch beside text, from Python, on the command line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.launch import Launcher, run_alone, start_alone
from tests.system.runs import PATIENCE_S, Line, Run, check_one_clear_line, check_ranks_add_up, prompts, write_lines
from tests.tiny_bert import TINY, build_tiny_bert

pytestmark = [pytest.mark.system, pytest.mark.slow]

SMALL = ("--max-tokens", 6, "--ctx", 256, "--slots", 4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="the gguf package (extra: test) writes the model")
    path = tmp_path_factory.mktemp("bert") / "bert.gguf"
    build_tiny_bert(path)
    return path


def inputs(count: int) -> list[Line]:
    """Requests for embeddings with 1 to 3 inputs each, every fourth of them as base64."""
    return [
        {
            "custom_id": f"e{k}", "method": "POST", "url": "/v1/embeddings",
            "body": {
                "input": [f"text {place} of {k}" for place in range(1 + k % 3)],
                "encoding_format": "base64" if k % 4 == 0 else "float",
            },
        }
        for k in range(count)
    ]  # fmt: skip


def vectors(line: Line) -> npt.NDArray[np.float32]:
    """(inputs, dimensions) what a line of the record holds."""
    body = line["response"]["body"]
    assert body["object"] == "list"
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    written = [one["embedding"] for one in body["data"]]
    read = [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in written]
    found: npt.NDArray[np.float32] = np.array(read, np.float32)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    return found


@pytest.mark.mpi
def test_text_and_embeddings_in_one_file(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    chat = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}}
    lines = [line for pair in zip(prompts(20), inputs(20), strict=True) for line in pair]
    lines += [{"custom_id": f"chat{k}", **chat} for k in range(5)]
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    done = mpirun(3, "batch", "-m", tiny_model, "-i", given, "-o", run.path, *SMALL, "--show", 50)
    assert done.rc == 0, done.output
    run.check_whole(line["custom_id"] for line in lines)
    check_ranks_add_up(run)
    found = run.by_id()
    for asked in inputs(20):
        line = found[asked["custom_id"]]
        assert len(vectors(line)) == len(asked["body"]["input"])
        assert (line["llmpi"]["output_tokens"], line["llmpi"]["ttft_s"]) == (0, None)
        assert line["response"]["body"]["usage"]["prompt_tokens"] == line["llmpi"]["prompt_tokens"] > 0
    assert found["chat0"]["response"]["body"]["choices"][0]["finish_reason"] in ("stop", "length")
    assert found["r1"]["llmpi"]["output_tokens"] > 0
    assert "numbers" in done.stdout


@pytest.mark.mpi
def test_an_embedding_model_on_several_ranks(mpirun: Launcher, bert: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", inputs(300))
    run = Run(tmp_path / "run")
    done = mpirun(3, "batch", "-m", bert, "-i", given, "-o", run.path, "--ctx", 256)
    assert done.rc == 0, done.output
    run.check_whole(f"e{k}" for k in range(300))
    check_ranks_add_up(run)
    again = Run(tmp_path / "again")
    assert run_alone("batch", "-m", bert, "-i", given, "-o", again.path, "--ctx", 256, "--quiet").rc == 0
    one, other = run.by_id(), again.by_id()
    for name, line in one.items():
        cosines = np.einsum("ij,ij->i", vectors(line), vectors(other[name]))
        assert cosines.min() > 0.9999


BAD: dict[str, tuple[Any, str]] = {
    "empty": ({"input": ""}, "input is"),
    "generation": ({"input": "a", "temperature": 0.5}, "temperature is for requests that generate text"),
    "too many": ({"input": ["a"] * 2_049}, "at most 2,048 inputs"),
    "dimensions": ({"input": "a", "dimensions": 0}, "dimensions is 0"),
    "nothing": ({"url": "/v1/embeddings", "body": {}}, "input is missing"),
    "prompt": ({"url": "/v1/embeddings", "body": {"prompt": "a"}}, "did you mean input?"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_before_anything_starts(bert: Path, tmp_path: Path, name: str) -> None:
    line, words = BAD[name]
    given = write_lines(tmp_path / "in.jsonl", [{"input": "good"}, line])
    done = run_alone("batch", "-m", bert, "-i", given, "-o", tmp_path / "run")
    check_one_clear_line(done, 2, "line 2", words)


def test_what_only_the_model_can_tell_fails_alone(bert: Path, tmp_path: Path) -> None:
    lines: list[Line] = [
        {"custom_id": "good", "input": "ab cd"},
        {"custom_id": "long", "input": "ab " * 600},
        {"custom_id": "second too long", "input": ["ab", "ab " * 600]},
        {"custom_id": "wide", "input": "ab", "dimensions": TINY.width + 1},
        {"custom_id": "tokens", "input": [5, 999_999]},
        {"custom_id": "text", "prompt": "continue"},
        {"custom_id": "narrow", "input": "ab cd", "dimensions": 8},
    ]
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    done = run_alone("batch", "-m", bert, "-i", given, "-o", run.path, "--quiet")
    assert done.rc == 1, done.output
    run.check_whole([line["custom_id"] for line in lines], failed=5)
    found = run.by_id()
    why = {name: line["error"]["message"] for name, line in found.items() if line["error"] is not None}
    assert "input[0] has 602 tokens, more than the 512 that this model can take" in why["long"]
    assert why["second too long"].startswith("input[1] has 602 tokens")
    assert f"this model's embeddings have {TINY.width}" in why["wide"]
    assert "token 999999 is not in the vocabulary" in why["tokens"]
    assert "is not a model that continues text: it can only be asked for embeddings" in why["text"]
    whole, narrow = vectors(found["good"])[0, :8], vectors(found["narrow"])[0]
    assert np.allclose(narrow, whole / np.linalg.norm(whole), atol=1e-4)


EMBED = """
import json, sys
import llmpi
with llmpi.Pool(sys.argv[1], embeddings=True, ctx=256) as pool:
    found = sorted(pool.embed(["ab cd", ["ab", "cd"], "ab cd"], dimensions=8), key=lambda result: result.index)
if pool.is_root:
    said = [[vector.tolist() for vector in result.embeddings] for result in found]
    print(json.dumps(said), flush=True)
"""


def test_a_pool_yields_numpy_arrays(bert: Path, tmp_path: Path) -> None:
    script = tmp_path / "embed.py"
    script.write_text(EMBED)
    with start_alone(bert, program=(script,)) as job:
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    first, both, again = json.loads(done.stdout)
    assert np.allclose(first, again, atol=1e-4)
    assert np.array(both).shape == (2, 8)


def test_the_command_prints_a_list_a_text_and_openais_object(bert: Path) -> None:
    plain = run_alone("embed", "-m", bert, "-p", "ab cd", "-p", "ef")
    assert plain.rc == 0, plain.output
    assert [len(json.loads(line)) for line in plain.stdout.splitlines()] == [TINY.width] * 2
    told = json.loads(run_alone("embed", "-m", bert, "-p", "ab cd", "-p", "ef", "--json").stdout)
    assert [one["embedding"] for one in told["data"]] == [json.loads(line) for line in plain.stdout.splitlines()]
    assert told["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_the_command_says_which_text_is_wrong(bert: Path) -> None:
    done = run_alone("embed", "-m", bert, "-p", "ab", "-p", "ab " * 600)
    check_one_clear_line(done, 2, "text 2", "602 tokens")
