"""What the rows of a step ask for, as arrays: all that is known of a choice before its logits are."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from workers.sampling import Flags, Ids, RowSampler, uniforms

WITHIN = np.uint64(0xD6E8FEB86659FD93)
"""Makes of a key that of other numbers."""


class Parameters:
    """An item for each row of a step. number: what is drawn with. whole: rows with a temperature and no filter, which
    draw twice; within: their second number."""

    __slots__ = (
        "by_k", "by_p", "by_typical", "log_min_p", "number", "samplers", "temperature", "top_k", "top_p", "typical_p",
        "whole", "within",
    )  # fmt: skip

    def __init__(self, samplers: Sequence[RowSampler], steps: npt.ArrayLike, vocab_tokens: int) -> None:
        """`steps`: the numbers of the output tokens, from 0."""
        self.samplers = samplers
        numbers = np.array([sampler.numbers for sampler in samplers])
        self.temperature, self.top_p, self.log_min_p, self.typical_p = numbers[:, :4].T
        self.top_k: Ids = numbers[:, 4].astype(np.int64)
        keys = np.array([sampler.key for sampler in samplers], np.uint64)
        with np.errstate(over="ignore"):
            self.number = uniforms(keys, np.asarray(steps))
            self.within = uniforms(keys ^ WITHIN, np.asarray(steps))
        self.by_k: Flags = (self.top_k > 0) & (self.top_k < vocab_tokens)
        self.by_typical: Flags = self.typical_p < 1.0
        # Greedy is top_k 1.
        together = ~self.by_k & ~self.by_typical
        self.by_p: Flags = together & (self.top_p < 1.0)
        self.whole: Flags = together & (self.top_p >= 1.0) & (self.log_min_p == -np.inf)

    def only(self, some: Ids) -> Parameters:
        """Of the rows at `some`."""
        one = copy.copy(self)
        one.samplers = [self.samplers[place] for place in some.tolist()]
        for name in self.__slots__:
            if name != "samplers":
                setattr(one, name, getattr(self, name)[some])
        return one
