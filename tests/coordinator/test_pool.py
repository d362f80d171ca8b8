"""The Python API in one process, over the null engine: what a person's code sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import llmpi
from coordinator.callbacks import Snapshot
from coordinator.pool import Pool, Result, result_of
from scheduling.errors import ConfigError, InputError, RequestError, UserError
from scheduling.recordline import encode_embeddings, encode_failure, encode_result
from scheduling.requests import Request
from tests.scheduling.test_logprobs import packed


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are alone, also where they are run inside a job."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_RANKID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def null_pool(**options: Any) -> Pool:
    return Pool("none", engine="null", slots=4, device="cpu", **options)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with null_pool() as opened:
        yield opened


# ---------------------------------------------------------------- answers


def test_every_prompt_is_answered_once_and_numbers_go_on(pool: Pool) -> None:
    first = list(pool.generate(["a", "b", "c"], max_tokens=5))
    second = list(pool.generate(["d"]))
    assert [result.error for result in first] == [None] * 3
    indexes = sorted(result.index for result in first)
    assert indexes == list(range(indexes[0], indexes[0] + 3))
    assert sorted(result.custom_id for result in first) == [f"request-{index}" for index in indexes]
    assert second[0].index == 0, "each call counts for itself"
    assert all(result.text and result.finish_reason == "length" for result in first)


def test_prompts_may_be_texts_dicts_lines_and_requests(pool: Pool) -> None:
    prompts: list[Any] = [
        "plain",
        {"custom_id": "body", "messages": [{"role": "user", "content": "x"}]},
        {"custom_id": "line", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
        Request(custom_id="own", kind="completion", prompt="x"),
    ]
    found = {result.custom_id: result for result in pool.generate(prompts)}
    assert {"body", "line", "own"} <= found.keys()
    assert len(found) == 4
    assert all(result.error is None for result in found.values())


def test_a_generator_is_read_no_further_than_needed(pool: Pool) -> None:
    read = []

    def endless() -> Iterator[str]:
        number = 0
        while True:
            read.append(number)
            yield f"prompt {number}"
            number += 1

    results = pool.generate(endless())
    for _ in range(5):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(read) < 1_000


def test_what_cannot_be_run_fails_alone(pool: Pool) -> None:
    prompts: list[Any] = ["good", {"prompt": "x", "top_q": 1}, 7, {"prompt": object()}, "\ud800", "good too"]
    results = sorted(pool.generate(prompts), key=lambda result: result.index)
    assert [result.error is None for result in results] == [True, False, False, False, False, True]
    assert "top_q" in str(results[1].error)
    assert "int" in str(results[2].error)
    assert all(result.text == "" and result.finish_reason == "error" for result in results if result.error)


def test_a_custom_id_that_comes_twice_fails_the_second_time(pool: Pool) -> None:
    results = list(pool.generate([{"custom_id": "same", "prompt": "x"}] * 2))
    assert sorted(result.error is None for result in results) == [False, True]


def test_nothing_to_generate_is_no_error(pool: Pool) -> None:
    assert list(pool.generate([])) == []


def test_abandoned_results_do_not_come_again(pool: Pool) -> None:
    for _ in pool.generate([{"custom_id": f"old-{k}", "prompt": "x"} for k in range(50)]):
        break
    assert [result.custom_id for result in pool.generate([{"custom_id": "new", "prompt": "x"}])] == ["new"]


def test_an_error_in_the_callers_iterable_reaches_the_caller(pool: Pool) -> None:
    def broken() -> Iterator[str]:
        yield "one"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(pool.generate(broken()))
    assert len(list(pool.generate(["goes on"]))) == 1


def test_stream_ends_and_raises_what_went_wrong(pool: Pool) -> None:
    assert list(pool.stream("hello")) == []  # the null engine says everything at the end
    with pytest.raises(RequestError, match="top_q"):
        list(pool.stream({"prompt": "x", "top_q": 1}))
    nothing: Any = None
    with pytest.raises(RequestError, match="a prompt must be a str, a dict or a Request, not NoneType"):
        list(pool.stream(nothing))


@pytest.mark.parametrize(
    "request_",
    [
        {"input": "x"},
        {"prompt": "x", "continuations": [" y"]},
        {"prompt": "x", "echo": True, "logprobs": 0, "max_tokens": 1},
    ],
)
def test_stream_refuses_what_has_no_pieces(pool: Pool, request_: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="use generate"):
        list(pool.stream(request_))
    assert len(list(pool.generate(["goes on"]))) == 1


# ---------------------------------------------------------------- callbacks


def test_inputs_to_embed_may_be_texts_tokens_lists_and_requests_and_fail_alone(pool: Pool) -> None:
    inputs: list[Any] = [
        "text", [5, 6], ["a", "b", "c"], [[1], [2]], {"input": "x", "custom_id": "body"},
        Request(custom_id="own", kind="embedding", inputs=("x",)), "", 5,
    ]  # fmt: skip
    found = sorted(pool.embed(inputs), key=lambda result: result.index)
    assert [len(result.embeddings) for result in found] == [1, 1, 3, 2, 1, 1, 0, 0]
    assert [result.custom_id for result in found[4:6]] == ["body", "own"]
    assert "input is" in (found[6].error or "")
    assert "int" in (found[7].error or "")


def test_a_single_text_in_place_of_a_list_of_inputs_is_refused(pool: Pool) -> None:
    with pytest.raises(InputError, match="give a list"):
        list(pool.embed("text"))


def test_callbacks_see_results_before_the_caller() -> None:
    seen: list[Result] = []
    ticks: list[Snapshot] = []
    with null_pool(on_result=seen.append, on_tick=ticks.append) as pool:
        for count, result in enumerate(pool.generate(["a", "b"]), 1):
            assert seen[count - 1] == result
    assert ticks


def test_the_pool_of_the_package_is_this_one() -> None:
    assert llmpi.Pool is Pool


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"slotz": 4}, "slotz"),
        ({"slots": "many"}, "slots is 'many': it must be a whole number or 'auto'"),
        ({"split": "foo"}, "split is 'foo': it must be 'layer' or 'row' or 'tensor'"),
        ({"threads": "many"}, "option threads is wrong: Expected `int | None`"),
        ({"loras": "a.gguf"}, "option loras is wrong: Expected `list`, got `str`"),
        ({"slots": 0}, "^slots is 0"),
        ({"schedule": "fastest"}, "fastest"),
        ({"engine": "steam"}, "steam"),
    ],
)
def test_unknown_or_impossible_option_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Pool("none", **options)


def test_files_may_be_given_as_paths(tmp_path: Path) -> None:
    with null_pool(loras=[tmp_path / "a.gguf"], stage_dir=tmp_path) as pool:
        assert len(list(pool.generate(["x"]))) == 1


@pytest.mark.parametrize(
    "sampling", [{"top_q": 1}, {"temperature": -1.0}, {"max_tokens": 0}, {"logprobs": 5}, {"top_logprobs": 5}]
)
def test_impossible_sampling_is_refused_at_once(pool: Pool, sampling: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        pool.generate(["x"], **sampling)


@pytest.mark.parametrize("prompts", ["one text", b"bytes", {"prompt": "x"}, 7])
def test_what_is_no_list_of_prompts_is_refused(pool: Pool, prompts: Any) -> None:
    with pytest.raises(InputError, match="prompts is of type"):
        list(pool.generate(prompts))


def test_two_generates_at_once_are_refused_and_the_first_goes_on(pool: Pool) -> None:
    first = pool.generate(["a", "b"])
    next(first)
    with pytest.raises(ConfigError, match="middle of another"):
        next(pool.generate(["c"]))
    assert len(list(first)) == 1


def test_a_pool_that_is_not_open_says_so() -> None:
    closed = null_pool()
    with pytest.raises(ConfigError, match="with statement"):
        closed.generate(["x"])
    with closed:
        pass
    with pytest.raises(ConfigError, match="with statement"):
        list(closed.stream("x"))


def test_missing_model_is_refused_on_entering() -> None:
    with pytest.raises(UserError, match=r"nothing\.gguf"), Pool("nothing.gguf"):
        pass


# ---------------------------------------------------------------- a line as a result


def test_result_has_what_the_line_says() -> None:
    request = Request(custom_id="c", kind="chat", messages=())
    choices = [("one", "stop", 2), ("two", "length", 3)]
    result = result_of(encode_result(request, 7, 2, 3, 0, choices, 11, 5, 0.1, 0.2, 0.9, 1, "m", 4))
    assert (result.custom_id, result.index, result.attempt, result.rank) == ("c", 7, 2, 3)
    assert result.texts == ("one", "two")
    assert result.text == "one"
    assert result.finish_reasons == ("stop", "length")
    assert (result.prompt_tokens, result.cached_tokens, result.output_tokens) == (11, 4, 5)
    assert (result.e2e_s, result.error) == (0.9, None)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_result_of_embeddings_has_their_vectors(encoding: Literal["float", "base64"]) -> None:
    request = Request(custom_id="c", kind="embedding", inputs=("a", "b"), encoding_format=encoding)
    vectors = np.array([[0.6, 0.8], [1, 0]], np.float32)
    result = result_of(encode_embeddings(request, 7, 2, 3, 0, vectors, 11, 0.1, 0.9, "m"))
    assert len(result.embeddings) == 2
    assert all(np.array_equal(got, one) for got, one in zip(result.embeddings, vectors, strict=True))
    assert result.embedding.dtype == np.float32
    assert np.array_equal(result.embedding, vectors[0])
    assert (result.texts, result.finish_reason, result.output_tokens, result.ttft_s) == ((), "stop", 0, None)


def test_result_has_log_probabilities_and_what_continuations_come_to() -> None:
    request = Request(custom_id="c", kind="completion", prompt="x", continuations=("a", "b"), logprobs=0)
    choices = [("a", "length", 0), ("b", "length", 0)]
    known = [packed([b"a"], [-0.5]), packed([b"b"], [-1.5])]
    result = result_of(encode_result(request, 7, 2, 3, 0, choices, 11, 0, 0.1, 0.0, 0.9, 1, "m", 0, known))
    assert result.scores == (llmpi.Score(-0.5, True), llmpi.Score(-1.5, True))
    assert [one and one["token_logprobs"] for one in result.logprobs] == [[-0.5], [-1.5]]
    assert result.ttft_s is None


def test_failed_line_is_a_result_with_its_error() -> None:
    result = result_of(encode_failure("c", 7, 1, 0, 0, "engine_died", "three engines died"))
    assert result.error == "three engines died"
    assert (result.texts, result.text, result.finish_reason) == ((), "", "error")
