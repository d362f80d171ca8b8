"""A line of the record: OpenAI's format, a checksum that sees every change, and what reads it back."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.recordline import (
    SEAL_BYTES,
    decode_row,
    encode_embeddings,
    encode_failure,
    encode_result,
    line_checks,
    request_row,
    seal,
)
from scheduling.requests import Message, Request
from scheduling.tables import FINISH_REASONS, REQUEST
from tests.scheduling.test_logprobs import packed

CHAT = Request(custom_id="a-1", kind="chat", messages=(Message("user", "hello"),))
TEXT = Request(custom_id="b-2", kind="completion", prompt="hello")


def result(request: Request = CHAT, choices: list[tuple[str, str, int]] | None = None, tokens: int = 5) -> bytes:
    return encode_result(
        request, 7, 2, 3, 1, choices or [("hi", "stop", tokens)], 11, tokens, 0.25, 0.5, 2.5, 1_700_000_000, "m", 4
    )


def test_chat_answer_is_openai_batch_output_with_timings_and_checksum_last() -> None:
    line = json.loads(result())
    assert list(line) == ["id", "custom_id", "response", "error", "llmpi", "crc32"]
    assert line["id"] == "batch_req_7"
    assert line["custom_id"] == "a-1"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"] == "req_7"
    body = line["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["created"] == 1_700_000_000
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "hi"}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 5,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert line["llmpi"] == {
        "index": 7,
        "attempt": 2,
        "rank": 3,
        "session": 1,
        "queue_s": 0.25,
        "ttft_s": 0.5,
        "tpot_s": 0.5,
        "e2e_s": 2.5,
        "prompt_tokens": 11,
        "output_tokens": 5,
        "finish_reason": "stop",
        "cached_tokens": 4,
        "end_s": None,
        "stolen_from": None,
    }


def test_completion_answer_has_text_choices() -> None:
    body = json.loads(result(TEXT))["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}]


def test_embeddings_are_openais_list_in_the_order_of_the_inputs() -> None:
    vectors = np.array([[0.1, 0.75], [1, 0]], np.float32)
    request = Request(custom_id="e-3", kind="embedding", inputs=("a", "b"))
    line = encode_embeddings(request, 7, 2, 3, 1, vectors, 11, 0.25, 2.5, "m")
    assert line_checks(line)
    assert json.loads(line)["response"]["body"] == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.1, 0.75]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 11, "total_tokens": 11},
    }
    timing = decode_row(line).llmpi
    assert (timing.output_tokens, timing.ttft_s, timing.tpot_s, timing.finish_reason) == (0, None, None, "stop")


def test_embeddings_are_base64_where_that_is_asked_for() -> None:
    request = Request(custom_id="e-4", kind="embedding", inputs=("a",), encoding_format="base64")
    line = encode_embeddings(request, 7, 2, 3, 1, np.array([[1, -2]], np.float32), 11, 0.25, 2.5, "m")
    assert json.loads(line)["response"]["body"]["data"][0]["embedding"] == "AACAPwAAAMA="


def test_log_probabilities_are_in_the_shape_of_the_endpoint() -> None:
    known = packed([b"hi"], [-0.5])
    arguments = (7, 2, 3, 1, [("hi", "stop", 1)], 11, 1, 0.25, 0.5, 2.5, 1_700_000_000, "m", 0, [known])
    chat, text = (json.loads(encode_result(one, *arguments)) for one in (CHAT, TEXT))
    assert chat["response"]["body"]["choices"][0]["logprobs"]["content"][0]["token"] == "hi"
    assert text["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] == [-0.5]
    assert "llmpi" not in text["response"]["body"]["choices"][0]


def test_a_continuation_says_what_it_comes_to() -> None:
    request = msgspec.structs.replace(TEXT, continuations=("a", "b"), logprobs=0)
    choices = [("a", "length", 0), ("b", "length", 0)]
    known = [packed([b"a"], [-0.5]), packed([b"b", b"c"], [-1.0, -2.0])]
    line = json.loads(encode_result(request, 7, 2, 3, 1, choices, 11, 0, 0.25, 0.0, 2.5, 1_700_000_000, "m", 0, known))
    found = line["response"]["body"]["choices"]
    assert [choice["llmpi"] for choice in found] == [
        {"logprob": -0.5, "is_greedy": True}, {"logprob": -3.0, "is_greedy": True}
    ]  # fmt: skip
    assert found[1]["logprobs"]["token_logprobs"] == [-1.0, -2.0]
    assert (line["llmpi"]["ttft_s"], line["llmpi"]["tpot_s"]) == (None, None)


def test_time_per_output_token_is_undefined_for_one_token_for_none_and_for_several_choices() -> None:
    one = json.loads(result(tokens=1))["llmpi"]
    assert one["tpot_s"] is None
    assert one["ttft_s"] == 0.5
    none = json.loads(result(tokens=0))["llmpi"]
    assert none["tpot_s"] is None
    assert none["ttft_s"] is None
    several = json.loads(result(choices=[("a", "stop", 3), ("b", "length", 2)]))
    assert several["llmpi"]["tpot_s"] is None
    assert several["llmpi"]["finish_reason"] == "length"
    assert [choice["index"] for choice in several["response"]["body"]["choices"]] == [0, 1]


def test_failure_has_an_error_and_no_response() -> None:
    line = encode_failure("c", 4, 1, 2, 0, "context_length", "too long", prompt_tokens=9000)
    found = json.loads(line)
    assert found["response"] is None
    assert found["error"] == {"code": "context_length", "message": "too long"}
    assert found["llmpi"]["finish_reason"] == "error"
    assert found["llmpi"]["prompt_tokens"] == 9000
    assert line_checks(line)
    assert json.loads(encode_failure("c", 4, 1, 2, 0, "cancelled", "stop"))["llmpi"]["finish_reason"] == "cancelled"


def test_undecodable_bytes_in_a_failure_are_replaced_not_raised() -> None:
    line = encode_failure("c", 4, 1, 2, 0, "os", "no file \udcff\udc80")
    assert line_checks(line)
    assert json.loads(line)["error"]["message"] == "no file ??"


def test_checksum_covers_every_byte_before_its_own_key() -> None:
    line = result()
    covered, key, rest = line.rpartition(b',"crc32":"')
    assert key
    assert rest == b'%08x"}\n' % zlib.crc32(covered)
    assert len(line) - len(covered) == SEAL_BYTES


def test_every_flipped_byte_and_every_truncation_is_seen() -> None:
    line = result()
    assert line_checks(line)
    for place in range(len(line)):
        changed = bytearray(line)
        changed[place] ^= 0x20
        assert not line_checks(bytes(changed)), place
        assert not line_checks(line[:place]), place
    assert not line_checks(line + b"\n")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=40)
def test_any_text_round_trips_in_one_line(text: str, custom_id: str) -> None:
    request = Request(custom_id=custom_id, kind="chat", messages=(Message("user", "x"),))
    line = result(request, [(text, "stop", 5)])
    assert line.count(b"\n") == 1
    assert line_checks(line)
    found = json.loads(line)
    assert found["custom_id"] == custom_id
    assert found["response"]["body"]["choices"][0]["message"]["content"] == text
    assert decode_row(line).custom_id == custom_id


@given(st.binary(max_size=200))
def test_garbage_never_checks_and_never_decodes_to_anything_but_a_value_error(data: bytes) -> None:
    assert not line_checks(data)
    with pytest.raises(ValueError, match=r".+"):
        decode_row(data)


def test_rows_become_numbers_with_nan_for_what_is_undefined() -> None:
    lines = [result(), result(tokens=0), encode_failure("c", 8, 1, 2, 0, "engine", "died", 3, 0.1, 0.2, 2)]
    table = np.array([request_row(decode_row(line)) for line in lines], REQUEST)
    assert table["index"].tolist() == [7, 7, 8]
    assert table["ok"].tolist() == [1, 1, 0]
    assert table["cached_tokens"].tolist() == [4, 4, 2]
    assert table["tpot_s"][0] == 0.5
    assert math.isnan(table["ttft_s"][1])
    assert math.isnan(table["tpot_s"][2])
    assert table["finish_reason"].tolist() == [
        FINISH_REASONS["stop"],
        FINISH_REASONS["stop"],
        FINISH_REASONS["error"],
    ]


def test_when_it_ended_and_from_whom_it_was_taken_are_kept_and_missing_in_older_lines() -> None:
    times: dict[str, Any] = {"end_s": 12.5, "stolen_from": 0}
    vectors = np.zeros((1, 2), np.float32)
    lines = [
        encode_result(TEXT, 7, 1, 3, 1, [("hi", "stop", 1)], 11, 1, 0.25, 0.5, 2.5, 1, "m", **times),
        encode_failure("c", 8, 1, 2, 0, "engine", "died", **times),
        encode_embeddings(msgspec.structs.replace(TEXT, inputs=("a",)), 9, 1, 3, 1, vectors, 1, 0.1, 0.2, "m", **times),
        result(),
        seal(result().replace(b',"end_s":null,"stolen_from":null', b"").partition(b',"crc32"')[0] + b"}"),
    ]
    table = np.array([request_row(decode_row(line)) for line in lines], REQUEST)
    assert table["stolen_from"].tolist() == [0, 0, 0, -1, -1]
    assert table["end_s"].tolist()[:3] == [12.5] * 3
    assert np.isnan(table["end_s"][3:]).all()


def test_a_finish_reason_of_a_newer_writer_is_other() -> None:
    row = decode_row(result(choices=[("x", "tool_calls", 5)]))
    assert request_row(row)[13] == FINISH_REASONS["other"]


def test_seal_of_any_object_checks() -> None:
    assert line_checks(seal(b'{"a":1}'))
