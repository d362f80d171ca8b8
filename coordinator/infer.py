"""`llmpi infer`: one prompt on stdout: its answer, or how likely some texts are after it."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from coordinator.config import JobConfig
from coordinator.pool import Pool, Result
from coordinator.values import tell
from scheduling.errors import EXIT_OK, ConfigError, RequestError
from scheduling.requestlines import request_line
from scheduling.requests import parse_request


def run_infer(
    config: JobConfig,
    prompt: str,
    *,
    system: str | None,
    raw: bool,
    echo: bool,
    max_tokens: int,
    stream: bool,
    logprobs: int | None,
    as_json: bool,
) -> int:
    """Print the answer; with `stream` as it is made, with `as_json` as one object with its timings.

    `echo`: the prompt before it, with its log-probabilities if `logprobs` asks for them and `max_tokens` is 0 or 1.

    Raises:
        ConfigError: for `logprobs` without `as_json`, which alone has room for them, for both ways of printing, for
            `echo` or `raw` beside what they cannot go with.
        RequestError: the request cannot be run.
    """
    if echo and (stream or not raw):
        raise ConfigError("--echo gives back a text that is continued as it is: give --raw, and leave out --stream")
    if raw and system is not None:
        raise ConfigError("--system is a message of a chat, and --raw continues a text as it is: give one of them")
    if stream and as_json:
        raise ConfigError("--stream prints a text as it is made, --json one object at the end: give one of them")
    if logprobs is not None and not as_json:
        raise ConfigError("--logprobs needs --json, which prints the numbers")
    request: dict[str, Any] = {"custom_id": "infer", **_sampling_fields(config), "max_tokens": max_tokens}
    if raw:
        request |= {"prompt": prompt, "logprobs": logprobs, "echo": echo}
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        request["messages"] = [*messages, {"role": "user", "content": prompt}]
        request |= {"logprobs": True, "top_logprobs": logprobs} if logprobs is not None else {}
    _check(request)
    with _pool(config) as pool:
        if stream:
            for piece in pool.stream(request):
                sys.stdout.write(piece)
                sys.stdout.flush()
            if pool.is_root:
                print()
            return EXIT_OK
        for result in pool.generate([request]):
            _print(result, as_json)
    return EXIT_OK


def run_score(config: JobConfig, prompt: str, continuations: list[str], logprobs: int | None, as_json: bool) -> int:
    """Print a line for each continuation: ln P, whether greedy decoding says it, the text as JSON."""
    request = {"custom_id": "infer", "prompt": prompt, "continuations": continuations, "logprobs": logprobs}
    _check(request)
    with _pool(config) as pool:
        for result in pool.generate([request]):
            if as_json or result.error is not None:
                _print(result, as_json)
                continue
            for text, score in zip(result.texts, result.scores, strict=True):
                greedy = "greedy" if score.is_greedy else ""
                print(f"{score.logprob:12.6f}  {greedy:6}  {json.dumps(text, ensure_ascii=False)}")
    return EXIT_OK


def _check(request: dict[str, Any]) -> None:
    """Raises RequestError, before a model is loaded for it."""
    parse_request(request_line(request))


def _pool(config: JobConfig) -> Pool:
    options = {name: getattr(config, name) for name in JobConfig.__struct_fields__ if name != "sampling"}
    return Pool(options.pop("model"), on_note=tell, **options)


def _sampling_fields(config: JobConfig) -> dict[str, Any]:
    sampling = config.sampling
    constraint = {} if sampling.constraint is None else sampling.constraint.field()
    return {
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "min_p": sampling.min_p, "stop": list(sampling.stop), **constraint,
    }  # fmt: skip


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        from coordinator.values import print_json

        print_json(msgspec.to_builtins(result) | {"text": result.text})
    if result.error is not None:
        raise RequestError(result.error)
    if not as_json:
        print(result.text)
