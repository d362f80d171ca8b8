"""`llmpi infer`: one prompt, one answer on stdout."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from coordinator.config import JobConfig
from coordinator.pool import Pool, Result
from scheduling.errors import EXIT_OK, RequestError


def run_infer(config: JobConfig, prompt: str, *, system: str | None, raw: bool, stream: bool, as_json: bool) -> int:
    """Print the answer; with `stream` as it is made, with `as_json` as one object with its timings."""
    request: dict[str, Any] = {"custom_id": "infer", **_sampling_fields(config)}
    if raw:
        request["prompt"] = prompt
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        request["messages"] = [*messages, {"role": "user", "content": prompt}]
    options = {name: getattr(config, name) for name in JobConfig.__struct_fields__ if name != "sampling"}
    with Pool(options.pop("model"), on_note=lambda note: print(note, file=sys.stderr), **options) as pool:
        if stream and not as_json:
            for piece in pool.stream(request):
                sys.stdout.write(piece)
                sys.stdout.flush()
            if pool.is_root:
                print()
            return EXIT_OK
        for result in pool.generate([request]):
            _print(result, as_json)
    return EXIT_OK


def _sampling_fields(config: JobConfig) -> dict[str, Any]:
    sampling = config.sampling
    constraint = {} if sampling.constraint is None else sampling.constraint.field()
    return {
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "min_p": sampling.min_p, "max_tokens": config.max_tokens, **constraint,
    }  # fmt: skip


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        from coordinator.cli import print_json

        print_json(msgspec.to_builtins(result) | {"text": result.text})
    elif result.error is not None:
        raise RequestError(result.error)
    else:
        print(result.text)
