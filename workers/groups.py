"""How a vocabulary is cut into groups of neighbouring tokens, and how one of all tokens is drawn by way of them.

With a temperature and no filter every token may come. A number in [0, 1) draws a group, which come as often as their
tokens weigh together; a second number then draws a token of that group. So the sums of the groups and the logits of one
of them decide: some thousand numbers, which a device makes and sends where the logits are (`workers.shortlist`),
instead of a hundred thousand.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

import numpy as np

from workers.sampling import Doubles, Floats, Ids

GROUPS_MAX = 1024
"""Up to so many a GPU sorts in one go."""
GROUPS_MIN = 256
"""With fewer, the tokens of a few groups are a large part of all."""


@lru_cache(maxsize=64)
def group_tokens(vocab_tokens: int) -> int:
    """Tokens in a group, all groups being equal; 0 if there is no number that is of use. Asked in each step."""
    for count in chain(range(GROUPS_MAX, GROUPS_MIN - 1, -1), range(GROUPS_MAX + 1, 4 * GROUPS_MAX + 1)):
        if vocab_tokens % count == 0 and count < vocab_tokens:
            return vocab_tokens // count
    return 0


def drawn_group_tokens(vocab_tokens: int) -> int:
    """Tokens in a group where the last one may be shorter."""
    return group_tokens(vocab_tokens) or -(-vocab_tokens // GROUPS_MAX)


def draw_group(edges: Doubles, numbers: Doubles) -> Ids:
    """(rows,) the group that each number in [0, 1) falls on. edges: (rows, groups) cumulated weights."""
    # A number of 53 bits under 1 times x is less than x: never past the last one, nor on what weighs nothing.
    target = numbers * edges[:, -1]
    group: Ids = np.count_nonzero(edges <= target[:, None], axis=1)
    return group


def draw_within(logits: Floats, temperatures: Doubles, numbers: Doubles) -> Ids:
    """(rows,) the token that is drawn from a group each. logits: (rows, tokens), of which one at least is finite."""
    below = logits.astype(np.float64)
    below -= below.max(axis=1, keepdims=True)
    edges = np.cumsum(np.exp(below / temperatures[:, None]), axis=1)
    return draw_group(edges, numbers)
