"""`llmpi embed`: some texts, and the embedding of each on stdout in their order."""

from __future__ import annotations

import msgspec

from coordinator.config import JobConfig
from coordinator.modelnames import find_model
from coordinator.pool import Pool, Result
from coordinator.values import tell
from scheduling.errors import EXIT_OK, RequestError
from scheduling.vectors import to_numbers


def run_embed(config: JobConfig, texts: list[str], *, dimensions: int | None, as_json: bool) -> int:
    """Print a list of numbers for each text; with `as_json` one object in OpenAI's format.

    Raises RequestError if one of the texts cannot be embedded.
    """
    options = {name: getattr(config, name) for name in JobConfig.__struct_fields__ if name != "sampling"}
    with Pool(options.pop("model"), on_note=tell, **options) as pool:
        results = sorted(pool.embed(texts, dimensions=dimensions), key=lambda result: result.index)
        if pool.is_root:
            _print(results, find_model(config.model).name, as_json)
    return EXIT_OK


def _print(results: list[Result], model: str, as_json: bool) -> None:
    for place, result in enumerate(results):
        if result.error is not None:
            raise RequestError(f"text {place + 1}: {result.error}")
    numbers = [to_numbers(result.embedding[None])[0] for result in results]
    if not as_json:
        for one in numbers:
            print(msgspec.json.encode(one).decode())
        return
    from coordinator.values import print_json

    tokens = sum(result.prompt_tokens for result in results)
    data = [{"object": "embedding", "index": place, "embedding": one} for place, one in enumerate(numbers)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    print_json({"object": "list", "data": data, "model": model, "usage": usage})
