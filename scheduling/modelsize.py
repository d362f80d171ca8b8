"""What a model takes of memory, as numbers: weights by layer, cache cells, buffers.

`ModelShape` is read from a model's header (`storage.gguf`). `needs` turns a `Layout` into bytes the way llama.cpp lays
things out: the matrix that looks tokens up stays in the host's memory, the output layer is the first to be offloaded,
later blocks go before earlier ones; a sequence has cells of its own, in multiples of 256. Weights and cells are exact.
Buffers are an upper estimate, compared with llama.cpp's own figures on the CPU (`docs/fitting.md`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

CELLS_TOGETHER = 256
"""llama.cpp rounds the cells of a sequence up to a multiple of this."""
POOLS = 2
"""Kernels of a GPU keep as much again as the graph, for converted inputs."""
CHECKED_ROWS = 32
"""Rows whose logits a context has room for at least: drafts are checked with them (`workers.speculation.ROWS_MAX`)."""
SCORING_CONTEXTS_GPU, ENCODING_CONTEXTS = 2, 2
"""How many there are, where they are needed (`workers.lanes`). On a CPU one weighs tokens."""
SCORED_LOGITS_BYTES_MAX = 128 << 20
"""Of logits that are wanted of a batch at once."""
DRAFTED_SEQUENCES = 8
"""So many of a context's sequences are drafted for (`workers.speculation.SLOTS_MAX`)."""
CACHE_BYTES_OF_32 = {"f16": 64, "q8_0": 34, "q4_0": 18}
"""What 32 values take in a cache of each type."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a model in bytes and in values.

    `cache_values`: how many values of keys and of values each layer keeps for a token. `cache_known` False: the
    architecture keeps another kind of state, and `cache_values` is what full attention would keep at most.
    """

    layer_bytes: tuple[int, ...]
    input_bytes: int
    """Stays in the host's memory."""
    output_bytes: int
    """Output matrix and norm; the input's matrix once more where both are one (`tied`)."""
    tied: bool = False
    cache_values: tuple[tuple[int, int], ...]
    cache_known: bool
    width: int
    feed_forward: int
    heads: int
    key_length: int
    value_length: int
    vocab_tokens: int
    train_ctx_tokens: int | None

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def offloadable(self) -> int:
        """Layers that a GPU can hold, the output layer included, as llama.cpp counts them."""
        return self.layers + 1

    @property
    def weight_bytes(self) -> int:
        """Everything, once."""
        return self.input_bytes + sum(self.layer_bytes) + self.output_bytes - self.tied * self.input_bytes

    def host_bytes(self, gpu_layers: int) -> int:
        """Weights in the host's memory with so many layers on the GPU."""
        if gpu_layers <= 0:
            return self.weight_bytes
        return self.input_bytes + sum(self.layer_bytes[: self._first_offloaded(gpu_layers)])

    def offloaded_bytes(self, gpu_layers: int) -> int:
        """Weights on the GPU with so many layers there: the output layer, then blocks from the last one back."""
        if gpu_layers <= 0:
            return 0
        return self.output_bytes + sum(self.layer_bytes[self._first_offloaded(gpu_layers) :])

    def token_bytes(self, type_k: str, type_v: str, gpu_layers: int | None = None) -> int:
        """What one token takes in the caches; with `gpu_layers`, in those on the GPU."""
        kept = self.cache_values if gpu_layers is None else self.cache_values[self._first_offloaded(gpu_layers) :]
        keys, values = sum(pair[0] for pair in kept), sum(pair[1] for pair in kept)
        return -(-(keys * CACHE_BYTES_OF_32[type_k] + values * CACHE_BYTES_OF_32[type_v]) // 32)

    def _first_offloaded(self, gpu_layers: int) -> int:
        return max(0, self.layers - max(0, gpu_layers - 1))


def cells_of(tokens: int) -> int:
    """Cells that a slot of so many tokens has."""
    return -(-tokens // CELLS_TOGETHER) * CELLS_TOGETHER


def graph_bytes(shape: ModelShape, *, rows: int, cells: int, flash: bool) -> int:
    """What llama.cpp's graph takes for a micro-batch of `rows` tokens of slots with so many cells, without logits.

    Activations: four of the model's width and three of its feed-forward part, 4 bytes each. The mask has 2 bytes for
    each row and cell; without flash attention 4, and so have the scores of each head.
    """
    activations = rows * 4 * (4 * shape.width + 3 * shape.feed_forward)
    attention = rows * cells * (2 if flash else 4 + 4 * shape.heads)
    return activations + attention


def logits_bytes(shape: ModelShape, slots: int) -> int:
    return 4 * shape.vocab_tokens * slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What was asked for. None: to be chosen. `gpu_layers` -1: all of them. `adapter_bytes`: beside the weights.

    `rope_factor`: how many times what the model was trained with it may have.
    """

    slots: int | None = None
    ctx_tokens: int | None = None
    contexts: int | None = None
    gpu_layers: int | None = None
    ubatch_tokens: int | None = None
    batch_tokens: int = 2048
    type_k: str = "f16"
    type_v: str = "f16"
    flash: bool = True
    rope_factor: float = 1.0
    split: str = "layer"
    gpu_sampling: bool = True
    adapter_bytes: int = 0
    draft_weight_bytes: int = 0
    draft_token_bytes: int = 0
    """Of a model that drafts: its weights, and what a token takes in its caches."""
    scores: bool = False
    input_tokens: int = 0
    """Beside what runs in slots: whether given tokens are weighed, and the tokens of the longest input to embed."""


class Layout(NamedTuple):
    """One way to use the memory."""

    gpu_layers: int
    contexts: int
    ubatch_tokens: int
    slots: int
    ctx_tokens: int
    long_slots: int = 0
    long_ctx_tokens: int = 0


class Needs(NamedTuple):
    """Bytes on all GPUs of a worker, and in the host's memory."""

    gpu_model: int
    gpu_buffers: int
    gpu_caches: int
    host_model: int
    host_buffers: int
    host_caches: int

    @property
    def gpu(self) -> int:
        return self.gpu_model + self.gpu_buffers + self.gpu_caches

    @property
    def host(self) -> int:
        return self.host_model + self.host_buffers + self.host_caches


def needs(shape: ModelShape, ask: Ask, layout: Layout, gpus: int) -> Needs:
    """The bytes that `layout` takes, on so many GPUs (0: on the CPU)."""
    layers = layout.gpu_layers if gpus else 0
    contexts = max(1, min(layout.contexts, layout.slots))
    each = -(-layout.slots // contexts)
    # Where the output layer is not on the GPU, or is split, tokens are chosen on the host.
    chooses = ask.gpu_sampling and layers >= shape.offloadable and ask.split != "tensor"
    buffers = contexts * _context_bytes(shape, ask, layout.ubatch_tokens, each, layout.ctx_tokens, gpus, chooses)
    logits = logits_bytes(shape, layout.slots + layout.long_slots)
    if layout.long_slots:
        buffers += _context_bytes(
            shape, ask, layout.ubatch_tokens, layout.long_slots, layout.long_ctx_tokens, gpus, chooses
        )
    cells = layout.slots * cells_of(layout.ctx_tokens) + layout.long_slots * cells_of(layout.long_ctx_tokens)
    for count, rows, shared in _contexts_beside(ask, layout, gpus):
        cells += count * shared
        graph = graph_bytes(shape, rows=rows, cells=shared, flash=ask.flash)
        buffers += count * graph * (POOLS * gpus if gpus else 1)
    if ask.scores:
        buffers += (SCORING_CONTEXTS_GPU if gpus else 1) * SCORED_LOGITS_BYTES_MAX
    caches = cells * shape.token_bytes(ask.type_k, ask.type_v)
    beside = ask.adapter_bytes + _draft_bytes(ask, layout, contexts)
    if not layers:
        model = shape.weight_bytes + beside
        return Needs(0, 0, 0, model, buffers + logits, caches)
    if chooses:
        # What a GPU says of its logits comes to memory of that size, three times over.
        logits *= 4
    gpu_caches = cells * shape.token_bytes(ask.type_k, ask.type_v, layers)
    gpu_model = shape.offloaded_bytes(layers) + beside
    if layers < shape.offloadable:
        # Prompts are computed on the GPU by all layers, whose weights are copied there for the moment.
        buffers += max(shape.layer_bytes, default=0)
    if gpus > 1 and ask.split != "tensor":
        # Whole layers are dealt out: a GPU may get one more than its share.
        most_cells = max((keys + values for keys, values in shape.cache_values), default=0)
        whole = sum(keys + values for keys, values in shape.cache_values)
        gpu_model += (gpus - 1) * max(shape.layer_bytes, default=0)
        gpu_caches += (gpus - 1) * (gpu_caches * most_cells // max(1, whole))
    return Needs(gpu_model, buffers, gpu_caches, shape.host_bytes(layers), logits, caches - gpu_caches)


def _contexts_beside(ask: Ask, layout: Layout, gpus: int) -> Iterator[tuple[int, int, int]]:
    """(contexts, rows of a micro-batch, cells that its sequences share) of what does not run in slots."""
    if ask.scores:
        cells = max(layout.ctx_tokens, layout.long_ctx_tokens) + ask.batch_tokens
        yield SCORING_CONTEXTS_GPU if gpus else 1, min(layout.ubatch_tokens, ask.batch_tokens), cells_of(cells)
    if ask.input_tokens:
        tokens = cells_of(max(layout.ubatch_tokens, ask.input_tokens))  # whole rows of as many sequences
        yield ENCODING_CONTEXTS, tokens, tokens


def _draft_bytes(ask: Ask, layout: Layout, contexts: int) -> int:
    """A model that drafts: itself, and cells for the few sequences of each context that it drafts for."""
    if not ask.draft_weight_bytes:
        return 0
    cells = min(layout.slots, DRAFTED_SEQUENCES * contexts) * cells_of(layout.ctx_tokens)
    cells += min(layout.long_slots, DRAFTED_SEQUENCES) * cells_of(layout.long_ctx_tokens)
    return ask.draft_weight_bytes + cells * ask.draft_token_bytes


def _context_bytes(
    shape: ModelShape, ask: Ask, ubatch: int, slots: int, ctx_tokens: int, gpus: int, chooses: bool
) -> int:
    """Buffers of one context of so many slots, on all of its GPUs, which may choose tokens."""
    cells = cells_of(ctx_tokens)
    graph = graph_bytes(shape, rows=min(ubatch, ask.batch_tokens), cells=cells, flash=ask.flash)
    if gpus:
        graph *= POOLS * gpus
    if gpus and (ask.type_k, ask.type_v) != ("f16", "f16"):
        # Attention over many rows reads 16 bits: the cells of one layer after the other are converted.
        graph += 2 * slots * cells * max((keys + values for keys, values in shape.cache_values), default=0)
    # A GPU that lists the likeliest tokens makes something of all logits.
    return graph + logits_bytes(shape, max(slots, CHECKED_ROWS)) * (2 if chooses else 1)
