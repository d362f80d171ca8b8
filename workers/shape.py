"""What shaping batches is worth on the hardware at hand: a few numbers, from the engine's configuration and its model.

Figures behind the constants are in benchmarks/RESULTS.md and docs/decisions. How batches are shaped is
`workers.passes`' business. Nothing here knows llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.protocol import EngineConfig

PASS_TOKENS_GPU = 192
PASS_TOKENS_CPU = 4
"""A pass over the weights takes as long as so many tokens of a prompt. On a GPU so many may be padding of one."""
PATIENCE_GPU = 0.6
"""... and as long as so many steps of those that decode."""
MOVES_PER_PASS = 4
"""Moving so many sequences costs about as much as a pass."""
COPY_TOKENS_MIN_GPU = 64
COPY_TOKENS_MIN_CPU = 16
"""Copying a slot, however small, takes as long as reading so many tokens of a prompt."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The defaults, for a CPU, shape nothing and keep nothing.

    steady: reading and decoding are passes of their own, idle slots take part in the latter. pad_tokens: most padding
    in a pass that reads prompts. moves: sequences may be moved to other slots to be neighbours. patience: how many
    rows may be kept idle, for each row that decodes, before waiting prompts are read, so that several are read in one
    pass. keeps: idle slots keep their cells for prompts that begin with the same tokens. copy_tokens: so many tokens of
    a prompt are read while a slot is copied.
    """

    steady: bool = False
    pad_tokens: int = 0
    moves: bool = False
    patience: float = 0.0
    keeps: bool = False
    copy_tokens: int = COPY_TOKENS_MIN_CPU


def shape_of(config: EngineConfig, *, on_gpu: bool, keeps_cells: bool, cell_bytes: int, model_bytes: int) -> Shape:
    """The shape for a model of `model_bytes` whose tokens take `cell_bytes` each in the cache.

    `keeps_cells`: its cells can be removed one by one.
    """
    steady = config.steady_batches
    if steady is None:
        steady = on_gpu
    keeps = config.prefix_reuse and keeps_cells
    # A copy reads and writes all cells of a slot, a pass reads all weights.
    share = config.ctx_tokens * cell_bytes / max(1, model_bytes)
    if not steady:
        return Shape(keeps=keeps, copy_tokens=max(COPY_TOKENS_MIN_CPU, math.ceil(2 * share * PASS_TOKENS_CPU)))
    if not keeps_cells:
        return Shape(steady=True, patience=PATIENCE_GPU)
    return Shape(
        steady=True,
        pad_tokens=PASS_TOKENS_GPU,
        moves=MOVES_PER_PASS * share <= 1,
        patience=PATIENCE_GPU,
        keeps=keeps,
        copy_tokens=max(COPY_TOKENS_MIN_GPU, math.ceil(2 * share * PASS_TOKENS_GPU)),
    )
