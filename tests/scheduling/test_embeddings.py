"""Lines that ask for embeddings: what is read, and what is refused for which reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scheduling.embeddings import INPUTS_MAX
from scheduling.errors import RequestError
from scheduling.requestlines import request_line
from scheduling.requests import Request, parse_request


def parse(value: object) -> Request:
    return parse_request(json.dumps(value).encode(), default_id="request-0")


def batch(**body: Any) -> dict[str, Any]:
    return {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": body}


def test_a_batch_line_is_read_with_all_its_parameters() -> None:
    request = parse(
        batch(input=["a", "b"], model="m", encoding_format="base64", dimensions=8, user="somebody"),
    )
    assert request == Request(
        custom_id="e",
        kind="embedding",
        inputs=("a", "b"),
        encoding_format="base64",
        dimensions=8,
        model="m",
        user="somebody",
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a text", ("a text",)),
        (["a", "b"], ("a", "b")),
        ([5, 6, 7], ((5, 6, 7),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
        (["x"] * INPUTS_MAX, ("x",) * INPUTS_MAX),
        ([1] * 5_000, ((1,) * 5_000,)),
    ],
)
def test_every_way_to_write_the_input_is_read(written: object, expected: tuple[object, ...]) -> None:
    assert parse(batch(input=written)).inputs == expected


@pytest.mark.parametrize("line", [{"input": "a"}, {"body": {"input": "a"}}, {"input": "a", "id": 7}])
def test_an_input_and_nothing_to_continue_makes_a_request_for_embeddings(line: dict[str, Any]) -> None:
    request = parse(line)
    assert (request.kind, request.inputs) == ("embedding", ("a",))
    assert request.custom_id == str(line.get("id", "request-0"))


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "input"},
        {"prompt": "say \"input\" and '/v1/embeddings'"},
        {"messages": [{"role": "user", "content": "input"}], "user": "/v1/embeddings"},
        {"prompt": "a", "metadata": {"input": "b"}},
        {"url": "/v1/completions", "body": {"prompt": "a", "user": "input"}},
    ],
)
def test_a_request_for_text_may_mention_what_asks_for_embeddings(line: dict[str, Any]) -> None:
    assert parse(line).kind in ("completion", "chat")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (batch(), "input is missing"),
        (batch(input=None), "input is missing"),
        (batch(input=""), 'body.input is ""; it must be a string that is not empty'),
        (batch(input=[]), "body.input is []"),
        (batch(input=["a", ""]), 'body.input[1] is ""'),
        (batch(input=[[1], []]), "body.input[1] is []"),
        (batch(input=[[1], [-1]]), "body.input[1] is [-1]"),
        (batch(input=["a", None]), "body.input[1] is null"),
        (batch(input={"text": "a"}), "body.input is"),
        (batch(input=["a", 1]), "body.input mixes"),
        (batch(input=["a"] * (INPUTS_MAX + 1)), "at most 2,048 inputs"),
        (batch(input="a", encoding_format="int8"), '"float" or "base64"'),
        (batch(input="a", dimensions=0), "body.dimensions is 0"),
        (batch(input="a", dimensions=2.5), "body.dimensions is 2.5"),
        (batch(input="a", dimensons=2), "did you mean dimensions?"),
        (batch(input="a", max_tokens=5), "body.max_tokens is for requests that generate text"),
        (batch(input="a", temperature=0), "body.temperature is for requests that generate text"),
        (batch(prompt="a"), "body.prompt; did you mean input?"),
        (batch(messages=[]), "body.messages; did you mean input?"),
        (batch(input="a") | {"url": "/v1/completions"}, "unknown parameter body.input; did you mean prompt?"),
        (batch(input="a") | {"url": "/v1/embedings"}, "/v1/embeddings"),
        (batch(input="a") | {"method": "GET"}, '"POST"'),
        ({"url": "/v1/embeddings", "input": "a"}, "input; it belongs inside body"),
        ({"url": "/v1/embeddings", "body": "a", "custom_id": "e"}, "body is missing"),
        ({"input": "a", "max_tokens": 5}, "A text to continue is given as prompt, not as input"),
        ({"input": "a", "prompt": "b"}, "did you mean prompt?"),
        ({"input": "a", "id": 1, "custom_id": 2}, "custom_id and id are both given"),
        ({"input": "a", "stream": True}, "stream is for requests that generate text"),
    ],
)
def test_a_wrong_line_is_refused_with_the_reason(line: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(line)
    assert words in str(caught.value)


def test_half_a_character_and_broken_json_are_named() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        parse_request(b'{"input": "\\ud800"}', default_id="x")
    with pytest.raises(RequestError, match="not JSON"):
        parse_request(b'{"input": "a"', default_id="x")
    with pytest.raises(RequestError, match="not UTF-8"):
        parse_request(b'{"input": "\xff"}', default_id="x")


@pytest.mark.parametrize(
    "request_",
    [
        Request(custom_id="a", kind="embedding", inputs=("x", "y"), dimensions=4, encoding_format="base64"),
        Request(custom_id="a", kind="embedding", inputs=((1, 2), (3,)), model="m", user="u"),
        Request(custom_id="a", kind="embedding", inputs=((1, 2),)),
    ],
)
def test_a_request_is_written_as_the_line_that_makes_it(request_: Request) -> None:
    assert parse_request(request_line(request_)) == request_
