"""Lines of input become requests, or are refused by name."""

from __future__ import annotations

import pytest

from scheduling.requests import Message, Request, Sampling, parse_request
from scheduling.wireform import MAX_TOKENS_LIMIT
from tests.scheduling.reading import CHAT, parse, refusal

# ---------------------------------------------------------------- the three ways to write a request


def test_chat_batch_line_becomes_a_request_with_its_messages_and_parameters() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
        "max_tokens": 7,
        "temperature": 0,
        "user": "u",
        "metadata": {"set": "a"},
        "stream": True,
    }
    request = parse({"custom_id": "q1", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert request == Request(
        custom_id="q1",
        kind="chat",
        sampling=Sampling(max_tokens=7, temperature=0.0),
        messages=(Message("system", "Be brief."), Message("user", "Hi", "Ann")),
        model="m",
        user="u",
        metadata={"set": "a"},
        stream=True,
    )


def test_completion_batch_line_takes_text_or_token_ids() -> None:
    line = {"custom_id": "q", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}
    assert parse(line).prompt == "Once"
    assert parse({**line, "body": {"prompt": [1, 2, 3]}}).prompt == (1, 2, 3)
    assert parse(line).kind == "completion"


def test_plain_lines_take_a_prompt_or_messages_and_an_id_by_either_name() -> None:
    assert parse({"prompt": "a", "id": 7}).custom_id == "7"
    assert parse({"prompt": "a", "custom_id": "x", "id": "x"}).custom_id == "x"
    assert parse(CHAT).kind == "chat"
    assert parse(CHAT, default_id="request-5").custom_id == "request-5"


def test_a_line_without_an_id_is_refused_where_the_caller_gives_none() -> None:
    assert refusal(b'{"prompt":"a"}').param == "custom_id"


def test_parameters_that_the_line_leaves_out_or_gives_as_null_come_from_the_defaults() -> None:
    defaults = Sampling(max_tokens=9, temperature=0.0, top_k=40, stop=("\n",), logit_bias={3: 1.0}, n=2)
    assert parse({"prompt": "a", "top_k": None}, defaults=defaults).sampling == defaults
    given_here = parse({"prompt": "a", "temperature": 1, "stop": [], "logit_bias": {}}, defaults=defaults).sampling
    assert (given_here.temperature, given_here.stop, given_here.logit_bias) == (1.0, (), {})
    assert given_here.max_tokens == 9


def test_text_parts_of_a_message_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0].content == "a\nb"


def test_values_that_change_nothing_are_accepted() -> None:
    neutral = {
        "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0, "echo": False, "suffix": "",
        "best_of": 1, "tools": [], "tool_choice": "none", "store": True, "service_tier": "flex", "audio": None,
        "modalities": ["text"], "stream_options": {"include_usage": True}, "parallel_tool_calls": False,
        "max_tokens": 5, "max_completion_tokens": 5,
    }  # fmt: skip
    assert parse({"prompt": "a", **neutral}) == parse({"prompt": "a", "max_tokens": 5})


def test_a_prompt_that_looks_like_a_batch_line_is_only_a_prompt() -> None:
    assert parse({"prompt": '{"body": 1}'}).prompt == '{"body": 1}'
    assert parse_request(b'{"\\u0062ody":{"prompt":"a"},"custom_id":"x"}').prompt == "a"
    assert parse({"prompt": "a", "metadata": {"body": "b"}}).metadata == {"body": "b"}


# ---------------------------------------------------------------- refused by name

OUT_OF_RANGE: list[tuple[str, object]] = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", MAX_TOKENS_LIMIT + 1), ("max_tokens", 10**40),
    ("max_tokens", 1.5), ("max_tokens", "5"), ("max_tokens", True), ("max_completion_tokens", 0),
    ("temperature", -0.1), ("temperature", 100.1), ("temperature", "hot"), ("temperature", float("nan")),
    ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.01), ("top_p", float("nan")), ("top_k", -1),
    ("min_p", 1), ("min_p", -0.1), ("typical_p", 0), ("typical_p", 2), ("repeat_penalty", 0),
    ("repeat_penalty", 11), ("repeat_last_n", -1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 0.5), ("n", 0), ("n", 129), ("stop", ""),
    ("stop", ["a"] * 17),
    ("stop", ["a", ""]), ("stop", 3), ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logit_bias", [1]),
    ("logit_bias", {"1": float("nan")}), ("logit_bias", {str(key): 0 for key in range(1025)}), ("ignore_eos", 1),
    ("stream", "yes"), ("user", 5), ("metadata", {"a": 1}), ("prompt", ""), ("prompt", []), ("prompt", [-1]),
    ("prompt", {"a": 1}), ("custom_id", ""), ("custom_id", 1.5), ("top_logprobs", 21), ("echo", 1), ("logprobs", 21),
    ("logprobs", -1), ("logprobs", "5"), ("continuations", []), ("continuations", "a"), ("continuations", [""]),
    ("continuations", [[]]), ("continuations", [[-1]]), ("continuations", ["a"] * 1025),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda item: str(item)[:20])
def test_a_value_out_of_range_is_refused_with_field_value_and_range(name: str, value: object) -> None:
    error = refusal({"prompt": "a", name: value}, line_number=12)
    assert error.param == name
    assert str(error).startswith(f"line 12: {name} is ")
    assert "; it must be a" in str(error) or "; it must be true" in str(error)
    if name != "custom_id":
        assert refusal({"custom_id": "x", "body": {"prompt": "a", name: value}}).param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", [{"type": "function"}]), ("tool_choice", "required"), ("suffix", "x"),
     ("best_of", 2), ("modalities", ["audio"]), ("audio", {})],
)  # fmt: skip
def test_what_only_a_later_version_can_do_is_refused_as_such(name: str, value: object) -> None:
    error = refusal({"prompt": "a", name: value})
    assert error.param == name
    assert "not supported in this version" in str(error)


@pytest.mark.parametrize(
    ("key", "near"),
    [("temprature", "temperature"), ("repetition_penalty", "repeat_penalty"), ("n_predict", "max_tokens"),
     ("max_token", "max_tokens"), ("message", "messages"), ("qqqq", "docs/requests.md")],
)  # fmt: skip
def test_an_unknown_parameter_is_refused_and_the_nearest_known_one_is_named(key: str, near: str) -> None:
    error = refusal({"prompt": "a", key: 1})
    assert f"unknown parameter {key}" in str(error)
    assert near in str(error)


def test_a_parameter_outside_the_body_is_told_to_go_inside() -> None:
    assert "inside body" in str(refusal({"custom_id": "a", "body": {"prompt": "a"}, "temperature": 1}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"url": "/v1/images", "body": {"input": "a"}}, "/v1/embeddings"),
        ({"url": "/v1/responses", "body": {"prompt": "a"}}, '"/v1/completions"'),
        ({"method": "GET", "body": {"prompt": "a"}}, '"POST"'),
        ({"method": "POST"}, "body is missing"),
        ({"body": "a"}, "body is"),
        ({"url": "/v1/chat/completions", "body": {"prompt": "a"}}, "takes messages"),
        ({"url": "/v1/completions", "body": CHAT}, "takes prompt"),
        ({}, "neither messages nor prompt"),
        ({"prompt": "a", **CHAT}, "both messages and prompt"),
        ({"prompt": ["a", "b"]}, "one request per line"),
        ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}, "two names of one parameter"),
        ({"prompt": "a", "id": 1, "custom_id": "b"}, "differ"),
        ({"messages": []}, "at least one"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0].weight"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no images"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text"),
        ([{"prompt": "a"}], "one object per line"),
        ("a", "JSON object"),
    ],
)
def test_a_wrong_shape_is_refused_with_the_reason(value: object, words: str) -> None:
    assert words in str(refusal(value))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "\xff"}', "byte 13 of the line (0xff) is not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature is NaN"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is Infinity"),
        (b'{"body": {"prompt": "a", "top_p": -Infinity}}', "body.top_p is -Infinity"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "too long"),
        (b"[" * 100_000, "nested"),
        (b'{"prompt": ' + b"[" * 100_000, "nested"),
    ],
    ids=range(11),
)
def test_a_line_that_is_not_json_says_where(line: bytes, words: str) -> None:
    assert words in str(refusal(line))


def test_nul_and_very_long_prompts_are_accepted() -> None:
    assert parse({"prompt": "a\0b"}).prompt == "a\0b"
    assert parse({"prompt": "x" * 10_000_000}).prompt == "x" * 10_000_000
