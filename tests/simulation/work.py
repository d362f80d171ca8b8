"""What a seed's job is asked, and what must come of each request: its answer, or the reason why it fails.

An answer depends on the request's seed and its prompt alone, so what an undisturbed run says is known beforehand.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from random import Random

from scheduling.seeds import derive_seed

REFUSED_BY_ENGINE = "please fail"
"""Prompts with this in them the engine answers with an error."""
POISON = "deadly"
"""Prompts with this in them end every engine that starts them."""


@dataclass(frozen=True)
class Expected:
    """`text` None: the request fails, with one of `codes`."""

    text: str | None
    tokens: int
    codes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Work:
    """The input of a job, as a file's content, and what is expected of each line."""

    content: bytes
    expected: list[Expected]
    precheck: bool
    run_seed: int
    poison: frozenset[int] = field(default_factory=frozenset)


def answer_text(seed: int, prompt: str, limit_tokens: int) -> tuple[str, int]:
    """What the engine says, and how many tokens that is."""
    number = zlib.crc32(f"{seed}:{prompt}".encode())
    return f"answer {number:08x}", 1 + number % max(1, limit_tokens)


def draw(dice: Random, max_tokens: int) -> Work:
    """Some requests, most of them good."""
    count = dice.choice((1, 3, 8, 15, 25, 25, 40, 60))
    precheck = dice.random() < 0.6
    run_seed = dice.randrange(1 << 32)
    odd = dice.random() < 0.5
    lines, expected, poison = [], [], set()
    for index in range(count):
        prompt = f"prompt {index} " + "x" * dice.choice((0, 10, 200))
        body: dict[str, object] = {"custom_id": f"r{index}"}
        kind = dice.random() if odd else 1.0
        if kind < 0.04:
            prompt += REFUSED_BY_ENGINE
        elif kind < 0.06:
            prompt += POISON
            poison.add(index)
        limit = max_tokens
        if dice.random() < 0.5:
            limit = body["max_tokens"] = dice.randint(1, max_tokens)
        seed = derive_seed(run_seed, index)
        if dice.random() < 0.3:
            seed = body["seed"] = dice.randrange(1 << 30)
        body["prompt"] = prompt
        if not precheck and kind > 0.93 and odd:
            body["prompt"] = None
            expected.append(Expected(None, 0, frozenset({"invalid_request"})))
        elif REFUSED_BY_ENGINE in prompt:
            expected.append(Expected(None, 0, frozenset({"request_failed"})))
        elif POISON in prompt:
            expected.append(Expected(None, 0, frozenset({"engine_died"})))
        else:
            expected.append(Expected(*answer_text(seed, prompt, limit)))
        lines.append(json.dumps(body))
    return Work("".join(line + "\n" for line in lines).encode(), expected, precheck, run_seed, frozenset(poison))
