"""Lines as they come and as we write them: properties of all, seeds, estimates, and the pages that show some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduling import lines, wireform
from scheduling.errors import RequestError
from scheduling.estimates import estimate_tokens
from scheduling.requestlines import request_line, text_line
from scheduling.requests import Message, Request, Sampling, parse_request
from scheduling.seeds import derive_seed
from scheduling.wireform import MAX_TOKENS_LIMIT
from tests.scheduling.reading import CHAT

# ---------------------------------------------------------------- properties

_KEYS = sorted(
    {*wireform.Plain.__struct_fields__, *wireform.Batch.__struct_fields__, "role", "content", "type", "text"}
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=5), inner),
    max_leaves=12,
)


def request_or_refusal(line: bytes) -> Request | None:
    try:
        return parse_request(line, default_id="d")
    except RequestError:
        return None


@given(st.binary(max_size=64))
@example(b'{"prompt":"\x00"}')
def test_arbitrary_bytes_are_a_request_or_a_refusal(line: bytes) -> None:
    request_or_refusal(line)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4))
def test_arbitrary_json_is_a_request_that_can_be_sent_on_or_a_refusal(value: dict[str, Any]) -> None:
    request = request_or_refusal(json.dumps({"prompt": "a", **value}).encode())
    if request is not None:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request


_GOOD: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, MAX_TOKENS_LIMIT), "temperature": st.floats(0, 100),
    "top_k": st.integers(0, 2**31 - 1),
    "top_p": st.floats(0, 1, exclude_min=True), "min_p": st.floats(0, 1, exclude_max=True),
    "typical_p": st.floats(0, 1, exclude_min=True), "repeat_penalty": st.floats(0, 10, exclude_min=True),
    "repeat_last_n": st.integers(0, MAX_TOKENS_LIMIT), "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2), "seed": st.integers(-(2**63), 2**63 - 1), "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    "stop": st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple), "n": st.integers(1, 128),
}  # fmt: skip


@settings(max_examples=60)
@given(st.fixed_dictionaries({}, optional=_GOOD), st.text(min_size=1, max_size=20))
def test_a_request_written_as_a_line_reads_back_the_same_whatever_the_defaults(
    sampling: dict[str, Any], prompt: str
) -> None:
    defaults = Sampling(temperature=0.0, max_tokens=None, top_k=7, stop=("x",), ignore_eos=True, n=3)
    for request in (
        Request(custom_id="a", kind="completion", sampling=Sampling(**sampling), prompt=prompt, model="m"),
        Request(custom_id="a", kind="chat", sampling=Sampling(**sampling), messages=(Message("user", prompt),)),
        Request(custom_id="a", kind="completion", sampling=Sampling(**sampling), prompt=prompt, echo=True),
        Request(custom_id="a", kind="completion", sampling=Sampling(**sampling), prompt=prompt, logprobs=3),
        Request(
            custom_id="a", kind="chat", sampling=Sampling(**sampling), messages=(Message("user", "b"),), logprobs=0
        ),
        Request(
            custom_id="a",
            kind="completion",
            sampling=Sampling(**{**sampling, "n": 1, "max_tokens": 0}),
            prompt=prompt,
            logprobs=2,
            continuations=("b", (3, 4)),
        ),
    ):
        assert parse_request(request_line(request), defaults) == request


@given(st.fixed_dictionaries({}, optional=_GOOD))
def test_the_slow_path_reads_what_the_fast_one_reads(sampling: dict[str, Any]) -> None:
    line = request_line({"custom_id": "a", "body": {**CHAT, **sampling}})
    assert lines.explain(line) == lines.decode_line(line)


# ---------------------------------------------------------------- lines we write, seeds, estimates


@given(st.text(min_size=1))
def test_a_text_line_reads_back_as_its_prompt(text: str) -> None:
    assert parse_request(text_line(text, "a")).prompt == text
    assert b"\n" not in text_line(text)


def test_what_json_cannot_say_is_refused_when_a_line_is_written() -> None:
    for value in ({"prompt": "a", "temperature": float("nan")}, {"prompt": "\ud800"}, {"prompt": object()}):
        with pytest.raises(RequestError):
            request_line(value)
    with pytest.raises(RequestError, match="surrogate"):
        text_line("a\udfff")


def test_derived_seeds_are_63_bits_differ_and_stay_the_same_for_ever() -> None:
    seeds = {derive_seed(run_seed, index) for run_seed in range(50) for index in range(200)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert abs(sum(seed >> 62 for seed in seeds) - 5_000) < 300
    assert derive_seed(0, 0) == 0xE220A8397B1DCDAF >> 1  # the first output of splitmix64 from state 0
    assert derive_seed(-1, 0) == derive_seed(2**64 - 1, 0)


def test_prompt_tokens_are_estimated_from_bytes() -> None:
    assert estimate_tokens(b"x" * 400) == estimate_tokens(400) == 100
    assert estimate_tokens(0) == 1


def test_every_parameter_is_documented_with_what_is_allowed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "requests.md").read_text(encoding="utf-8")
    names = {
        *wireform.Plain.__struct_fields__,
        *wireform.Batch.__struct_fields__,
        *wireform.WireMessage.__struct_fields__,
    }
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_the_examples_are_requests_of_their_own_small_enough_for_a_demo() -> None:
    raw = (Path(__file__).parents[2] / "examples" / "prompts.jsonl").read_bytes().splitlines()
    requests = [parse_request(line) for line in raw]
    assert len({request.custom_id for request in requests}) == len(requests) == 80
    assert {request.kind for request in requests} == {"chat", "completion"}
    limits = [request.sampling.max_tokens or 0 for request in requests]
    assert min(limits) >= 16
    assert max(limits) <= 96
    assert sum(request.sampling.n * limit for request, limit in zip(requests, limits, strict=True)) <= 4_000
