"""Lines of input become requests, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduling import lines, wireform
from scheduling.constraints import Constraint
from scheduling.errors import RequestError
from scheduling.estimates import estimate_tokens
from scheduling.requestlines import request_line, text_line
from scheduling.requests import Message, Request, Sampling, parse_request
from scheduling.seeds import derive_seed
from scheduling.wireform import MAX_TOKENS_LIMIT

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def parse(value: object, **kwargs: Any) -> Request:
    kwargs.setdefault("default_id", "d")
    return parse_request(json.dumps(value).encode(), **kwargs)


def refusal(value: object, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(value, **kwargs) if isinstance(value, bytes) else parse(value, **kwargs)
    return caught.value


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


# ---------------------------------------------------------------- log-probabilities

GRAMMAR = 'root ::= "a"'
SCORED: dict[str, object] = {"prompt": "a", "continuations": ["b"]}


def test_log_probabilities_are_asked_for_as_each_endpoint_has_it() -> None:
    assert parse({**CHAT, "logprobs": True, "top_logprobs": 5}).logprobs == 5
    assert parse({**CHAT, "logprobs": True}).logprobs == 0
    assert parse({**CHAT, "logprobs": False, "top_logprobs": 0}).logprobs is None
    assert parse({"prompt": "a", "logprobs": 3}).logprobs == 3
    assert parse({"prompt": "a", "logprobs": 0}).logprobs == 0
    assert parse({"prompt": "a", "echo": True}).echo
    assert not parse({"prompt": "a", "echo": True}).scores


def test_a_prompt_or_continuations_are_scored() -> None:
    prompt = parse({"prompt": [1, 2], "echo": True, "logprobs": 1, "max_tokens": 1})
    assert (prompt.scores, prompt.sampling.max_tokens, prompt.logprobs) == (True, 1, 1)
    assert parse({"prompt": "a", "echo": True, "logprobs": 0, "max_tokens": 0}).scores
    given = parse({"prompt": "a", "continuations": ["b", [7, 8]]}, defaults=Sampling(max_tokens=64))
    assert (given.scores, given.continuations, given.logprobs) == (True, ("b", (7, 8)), 0)
    assert given.sampling.max_tokens == 0, "whatever the default for requests that generate"


def test_a_runs_form_of_answers_is_not_for_what_is_scored() -> None:
    held = Sampling(constraint=parse({"prompt": "a", "grammar": GRAMMAR}).sampling.constraint)
    assert parse({"prompt": "a"}, defaults=held).sampling.constraint is not None
    assert parse({**SCORED, "response_format": {"type": "text"}}, defaults=held).sampling.constraint is None
    assert parse({**SCORED}, defaults=held).sampling.constraint is None


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer from 0 to 20 in a completion"),
        ({"prompt": "a", "top_logprobs": 2}, "top_logprobs", "left out in a completion"),
        ({**CHAT, "logprobs": 5}, "logprobs", "top_logprobs says how many"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs", "where logprobs is not true"),
        ({**CHAT, "echo": True}, "echo", "in a chat"),
        ({**CHAT, "continuations": ["a"]}, "continuations", "in a chat"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "0 beside echo and logprobs"),
        ({"prompt": "a", "max_tokens": 0, "echo": True}, "max_tokens", "0 beside echo and logprobs"),
        ({**CHAT, "max_tokens": 0, "logprobs": True}, "max_tokens", "0 beside echo and logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "max_tokens", "(or 1, for one token more)"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 2}, "max_tokens", "leave out echo"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}, "n", "one answer"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1, "grammar": GRAMMAR}, "grammar", "are scored"),
        ({**SCORED, "n": 2}, "n", "one answer"),
        ({**SCORED, "json_schema": {}}, "json_schema", "are scored"),
        ({**SCORED, "response_format": {"type": "json_object"}}, "response_format", "are scored"),
        ({**SCORED, "echo": True}, "echo", "beside continuations"),
        ({**SCORED, "max_tokens": 5}, "max_tokens", "nothing is generated"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(value: object, param: str, words: str) -> None:
    error = refusal(value)
    assert error.param == param
    assert words in str(error)


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


# ---------------------------------------------------------------- what the text may be

YES_NO = 'root ::= "yes" | "no"'
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": True}}
NAMED = {"name": "pair", "schema": SCHEMA, "strict": True, "description": "Two of them."}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"grammar": YES_NO}, Constraint("grammar", YES_NO)),
        ({"grammar": YES_NO, "response_format": {"type": "text"}}, Constraint("grammar", YES_NO)),
        ({"json_schema": SCHEMA}, Constraint("schema", json.dumps(SCHEMA, separators=(",", ":")))),
        ({"response_format": {"type": "json_object"}}, Constraint("schema", '{"type":"object"}')),
        ({"response_format": {"type": "text"}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_request_says_what_its_text_may_be(given: dict[str, Any], expected: Constraint | None) -> None:
    assert parse({**CHAT, **given}).sampling.constraint == expected


def test_openais_form_of_a_schema_means_the_schema_whatever_its_name() -> None:
    form = {"type": "json_schema", "json_schema": NAMED}
    same = parse({"prompt": "a", "json_schema": SCHEMA})
    assert parse({"prompt": "a", "response_format": form}) == same
    assert parse({"custom_id": "d", "body": {"prompt": "a", "response_format": form}}) == same


def test_a_runs_constraint_holds_for_requests_that_do_not_say() -> None:
    defaults = Sampling(constraint=Constraint("grammar", YES_NO))
    assert parse({"prompt": "a", "json_schema": None}, defaults=defaults).sampling == defaults
    assert parse({"prompt": "a", "response_format": {"type": "text"}}, defaults=defaults).sampling.constraint is None
    assert parse({"prompt": "a", "json_schema": {}}, defaults=defaults).sampling.constraint == Constraint(
        "schema", "{}"
    )


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"grammar": YES_NO, "json_schema": {}}, "json_schema", "grammar and json_schema are both given"),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, "response_format", "both given"),
        ({"grammar": "root ::= x"}, "grammar", "line 1, column 10: there is no rule named x"),
        ({"grammar": ""}, "grammar", "not empty"),
        ({"grammar": "#" * 70_000}, "grammar", "70,000 bytes; at most 65,536"),
        ({"json_schema": {"const": "x" * 70_000}}, "json_schema", "70,012 bytes; at most 65,536"),
        ({"json_schema": [SCHEMA]}, "json_schema", "a JSON schema that is an object"),
        ({"json_schema": "{}"}, "json_schema", "a JSON schema that is an object"),
        ({"json_schema": {"x-guidance": {}}}, "json_schema", "x-guidance, which is not supported"),
        ({"json_schema": json.loads('{"items":' * 101 + "{}" + "}" * 101)}, "json_schema", "nested deeper than 100"),
        ({"grammar": YES_NO, "ignore_eos": True}, "ignore_eos", "ends when it is whole"),
        ({"response_format": {"type": "xml"}}, "response_format", '{"type": "json_object"}'),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "it must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", '"schema"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema", "a JSON schema that is an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strct": True}}},
         "response_format.json_schema.strct", "did you mean strict?"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": 1}}},
         "response_format.json_schema.strict", "true or false"),
    ],
    ids=lambda item: str(item)[:30],
)  # fmt: skip
def test_what_cannot_be_a_constraint_is_refused_when_it_is_read(
    given: dict[str, Any], param: str, message: str
) -> None:
    for error in (refusal({"prompt": "a", **given}), refusal({"custom_id": "x", "body": {"prompt": "a", **given}})):
        assert error.param == param
        assert message in str(error)


@pytest.mark.parametrize(
    "constraint", [None, Constraint("grammar", YES_NO), Constraint("schema", '{"title":"b","const":2}')]
)
def test_a_constraint_survives_being_written_as_a_line(constraint: Constraint | None) -> None:
    request = Request(custom_id="a", kind="completion", prompt="p", sampling=Sampling(constraint=constraint))
    other = Sampling(constraint=Constraint("grammar", 'root ::= "other"'))
    assert parse_request(request_line(request), other) == request


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


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"tpye": "string"}, "tpye.*did you mean type"),
        ({"type": "object", "properties": {"a": {"type": "string", "maxlength": 3}}}, "properties.a has 'maxlength'"),
        ({"anyOf": [{"type": "string"}, {"foo": 1}]}, r"anyOf\[1\] has 'foo'"),
    ],
)
def test_what_is_no_keyword_of_a_schema_is_named(schema: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        parse_request(json.dumps({"prompt": "x", "json_schema": schema}).encode(), default_id="a")


def test_names_of_properties_may_be_anything_in_a_schema() -> None:
    schema = {"type": "object", "properties": {"tpye": {"enum": [{"foo": 1}]}}, "required": ["tpye"]}
    parse_request(json.dumps({"prompt": "x", "json_schema": schema}).encode(), default_id="a")
