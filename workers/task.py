"""One request inside the engine: what it asks for, how far its choices are, and how it is answered.

The backlog moves tasks from state to state (`workers.backlog`), the preparing thread sets what they ask for, the
stepping threads note what came of them. This module knows neither threads nor llama.cpp.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from scheduling.requests import Sampling
from scheduling.vectors import Vectors, to_bytes
from workers.protocol import Answer, Choice, Job

if TYPE_CHECKING:
    from workers.constraints import Grammar


class Lane(Enum):
    """What a context is made for. `workers.engine` opens the contexts of a lane that is needed."""

    GENERATE = "generate"
    EMBED = "embed"
    LONG = "long"
    """Generation that needs more cells than the slots of GENERATE have."""
    SCORE = "score"


class State(Enum):
    RAW = "raw"
    READY = "ready"
    STARTED = "started"
    GONE = "gone"


class Task:
    """One request inside the engine. Its choices may run at different times and in different contexts.

    Each input of a request for embeddings is a choice.
    """

    __slots__ = (
        "admitted_s",
        "cached_tokens",
        "cancelled",
        "choices",
        "continuations",
        "error",
        "first_token_s",
        "grammar",
        "job",
        "lane",
        "limit",
        "next_choice",
        "prompt",
        "received_s",
        "starts",
        "state",
        "unfinished",
        "vectors",
    )

    def __init__(self, job: Job, received_s: float) -> None:
        self.job = job
        self.received_s = received_s
        self.state = State.RAW
        self.lane = Lane.GENERATE
        """Which contexts can run it; set with `prompt`."""
        self.prompt: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.continuations: list[npt.NDArray[np.int32]] = []
        """Tokens that may follow the prompt, to be scored; set with `prompt`."""
        self.limit = 0
        """Most output tokens of a choice; set with `prompt`."""
        self.grammar: Grammar | None = None
        """What the text has to follow; set with `prompt`."""
        self.starts: npt.NDArray[np.int32] = np.empty(0, np.int32)
        """Where in `prompt` each input begins, and the last one ends; set with `prompt`, for embeddings only."""
        self.vectors: Vectors = np.empty((0, 0), np.float32)
        """(inputs, dimensions), filled as they are computed; set with `prompt`, for embeddings only."""
        self.next_choice = 0
        self.choices: list[Choice | None] = [None] * (len(job.request.inputs) or max(1, job.request.sampling.n))
        self.unfinished = len(self.choices)
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.cached_tokens: int | None = None
        """Tokens of the prompt that no choice had to read."""
        self.error: str | None = None
        self.cancelled = False

    @property
    def key(self) -> int:
        return self.job.key

    @property
    def sampling(self) -> Sampling:
        return self.job.request.sampling

    def answer(self, now_s: float) -> Answer:
        """The end of the request, all choices being there or `error` set."""
        choices = [] if self.error is not None else [choice for choice in self.choices if choice is not None]
        admitted = now_s if self.admitted_s is None else self.admitted_s
        return Answer(
            key=self.key,
            choices=choices,
            prompt_tokens=int(self.prompt.size) + sum(int(tokens.size) for tokens in self.continuations),
            output_tokens=sum(choice.output_tokens for choice in choices),
            queue_s=admitted - self.received_s,
            ttft_s=0.0 if self.first_token_s is None else self.first_token_s - self.received_s,
            e2e_s=now_s - self.received_s,
            error=self.error,
            cached_tokens=self.cached_tokens or 0,
            vectors=to_bytes(self.vectors) if self.vectors.size and self.error is None else b"",
        )
