"""What a benchmark asks of an engine: requests of random tokens, the same for the same seed and repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from scheduling.errors import ConfigError
from scheduling.lengths import Lengths
from scheduling.modelsize import CELLS_TOGETHER
from scheduling.requests import Request, Sampling
from workers.protocol import Job

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the engine is asked. Lengths in tokens. `sigma` > 0: output lengths are lognormal around `output_tokens`
    (their mean), clipped to 1 ... `output_tokens_max`. `shared_prefix_tokens` of each prompt are the same in all."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_max: int
    sigma: float = 0.0
    shared_prefix_tokens: int = 0
    interrupt_tokens: int = 0
    """A prompt of so many tokens comes every `interrupt_every_s` seconds, for one token of output, unless the one
    before is still being read; 0: none comes."""
    interrupt_every_s: float = 1.0
    concurrency: int | None = None
    """Requests that the engine has at once; None hands out all of them at once."""
    sampling: Sampling = GREEDY
    seed: int = 0

    def __post_init__(self) -> None:
        least_one = {
            "--requests": self.requests,
            "--prompt-tokens": self.prompt_tokens,
            "--output-tokens": self.output_tokens,
            "--concurrency": 1 if self.concurrency is None else self.concurrency,
        }
        for flag, value in least_one.items():
            if value < 1:
                raise ConfigError(f"{flag} is {value}: it must be 1 or more")
        if self.sigma < 0:
            raise ConfigError(f"--sigma is {self.sigma}: it must be 0 or more")
        if self.interrupt_tokens < 0:
            raise ConfigError(f"--interrupt-tokens is {self.interrupt_tokens}: it must be 0 or more")
        if not self.interrupt_every_s > 0:
            raise ConfigError(f"--interrupt-every is {self.interrupt_every_s}: it must be above 0 seconds")
        if not 0 <= self.shared_prefix_tokens < self.prompt_tokens:
            raise ConfigError("--shared-prefix must be 0 or more, and less than --prompt-tokens")

    def lengths(self) -> Lengths:
        """What a look-ahead would find; every request may have as many output tokens as any."""
        most = self.prompt_tokens + self.output_tokens_max
        counts = {-(-most // CELLS_TOGETHER): self.requests}
        if self.interrupt_tokens:
            counts.setdefault(-(-(self.interrupt_tokens + 1) // CELLS_TOGETHER), 1)
        at_once = min(self.requests, self.concurrency or self.requests)
        return Lengths(at_once, counts, max(most, self.interrupt_tokens + 1), whole=True)

    def jobs(self, vocab_tokens: int, repeat: int) -> list[Job]:
        """The requests of one repeat. The same seed and repeat give the same requests."""
        random = np.random.default_rng((self.seed, repeat))
        prompts = random.integers(0, vocab_tokens, (self.requests, self.prompt_tokens), dtype=np.int64)
        prompts[:, : self.shared_prefix_tokens] = prompts[0, : self.shared_prefix_tokens]
        jobs = []
        for key, (prompt, output) in enumerate(zip(prompts.tolist(), self._lengths(random).tolist(), strict=True)):
            jobs.append(self.job(key, prompt, output))
        return jobs

    def job(self, key: int, prompt: list[int], output_tokens: int) -> Job:
        """One request, which ends after `output_tokens` and not before."""
        sampling = msgspec.structs.replace(self.sampling, max_tokens=output_tokens, ignore_eos=True)
        request = Request(custom_id=str(key), kind="completion", prompt=tuple(prompt), sampling=sampling)
        return Job(key, key + 1, False, request)

    def interrupts(self, vocab_tokens: int, repeat: int) -> Interrupts | None:
        """The long prompts that come between the others."""
        return Interrupts(self, vocab_tokens, repeat) if self.interrupt_tokens else None

    def _lengths(self, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self.sigma:
            return np.full(self.requests, self.output_tokens)
        # The mean of a lognormal is exp(mu + sigma^2 / 2).
        drawn = random.lognormal(np.log(self.output_tokens) - self.sigma**2 / 2, self.sigma, self.requests)
        return np.clip(np.rint(drawn), 1, self.output_tokens_max).astype(np.int64)


class Interrupts:
    """The long prompts of one repeat, by the time at which they come."""

    def __init__(self, load: Load, vocab_tokens: int, repeat: int) -> None:
        self._load = load
        self._vocab_tokens = vocab_tokens
        self._random = np.random.default_rng((load.seed, repeat, 1))
        self._passed = 0
        self.made = 0
        self.left_out = 0

    def due(self, elapsed_s: float, *, idle: bool) -> list[Job]:
        """The one that has come since the last call, if any. `idle` False: the one before is unanswered, and what comes
        now is left out, or an engine that is slower than that would never end. So are all but one of several."""
        load, passed = self._load, int(elapsed_s / self._load.interrupt_every_s)
        came, self._passed = passed - self._passed, passed
        given = min(came, 1) if idle else 0
        self.left_out += came - given
        if not given:
            return []
        prompt = self._random.integers(0, self._vocab_tokens, load.interrupt_tokens)
        self.made += 1
        return [load.job(load.requests + self.made - 1, prompt.tolist(), 1)]
