"""llama.cpp's contexts with their batches: `LlamaContext` is the `Decoder` that `workers.stepper` drives,
`LlamaEncoder` the `Encoder` of `workers.embedder`.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from scheduling.errors import EngineError
from workers.backend_sampling import BackendSampling
from workers.llama_backend import forget_errors, recent_errors
from workers.protocol import EngineConfig
from workers.shortlist import Shortlist

if TYPE_CHECKING:
    from workers.llama import LlamaModel

Ints = npt.NDArray[np.int32]

KV_PADDING = 256
"""llama.cpp rounds the cells of each sequence up to a multiple of this."""
SEQUENCES_MAX = 256
"""LLAMA_MAX_SEQ: most sequences of a context."""
_CACHE_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}
_ROPE_SCALINGS = {
    "none": lib.LLAMA_ROPE_SCALING_TYPE_NONE,
    "linear": lib.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": lib.LLAMA_ROPE_SCALING_TYPE_YARN,
}


def set_attention(params: Any, config: EngineConfig) -> None:
    """Flash attention and rotary positions, where the configuration says something of them."""
    if config.flash_attention is not None:
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if config.flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
    if config.rope_scaling is not None:
        params.rope_scaling_type = _ROPE_SCALINGS[config.rope_scaling]
    if config.rope_scale is not None:
        params.rope_freq_scale = 1.0 / config.rope_scale
    if config.rope_freq_base is not None:
        params.rope_freq_base = config.rope_freq_base


def open_context(model: LlamaModel, config: EngineConfig, params: Any, what: str, remedy: str) -> Any:
    """llama.cpp's context over `model`, with its adapters. Raises `EngineError`, which says `what` and `remedy`."""
    set_attention(params, config)
    forget_errors()
    context = lib.llama_init_from_model(model.handle, params)
    if not context:
        raise EngineError(
            f"llama.cpp cannot make a context {what}: {recent_errors()}. Use {remedy} or fewer --gpu-layers"
        )
    model.adapt(context)
    return context


class BatchArrays:
    """A batch whose arrays are numpy's. Fill rows [0, n) of `token`, `pos`, `seq` (sorted by sequence id: see the docs
    of `workers.stepper`) and `wanted` (1 where an output is wanted)."""

    def __init__(self, size: int) -> None:
        # Our own arrays instead of llama_batch_init's: each row's sequence list is one entry of `seq`, found
        # through a table of pointers into it that never changes.
        self.token: Ints = np.zeros(size, np.int32)
        self.pos: Ints = np.zeros(size, np.int32)
        self.seq: Ints = np.zeros(size, np.int32)
        self.wanted: npt.NDArray[np.int8] = np.zeros(size, np.int8)
        self._one_each: Ints = np.ones(size, np.int32)
        self._seq_pointers = self.seq.ctypes.data + np.arange(size, dtype=np.uintp) * self.seq.itemsize
        self._batch = lib.llama_batch()
        self._batch.embd = None
        for name, array in (
            ("token", self.token),
            ("pos", self.pos),
            ("n_seq_id", self._one_each),
            ("seq_id", self._seq_pointers),
            ("logits", self.wanted),
        ):
            kind = dict(lib.llama_batch._fields_)[name]
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, kind))


class LlamaContext(BatchArrays):
    """A context that generates: its KV cells and its batch. Fill the batch, call `decode(n)`, then `logits(rows)`."""

    def __init__(
        self,
        model: LlamaModel,
        config: EngineConfig,
        slots: int,
        threads: int,
        *,
        shared_cells: int | None = None,
        outputs: int | None = None,
        chooses: bool = False,
    ) -> None:
        """`shared_cells`: cells for all sequences together, of which several can hold the same one; None gives each
        sequence its own. `outputs`: most rows of a batch whose logits are wanted; None is one for each slot. `chooses`:
        the device finds the largest logit of each row (`workers.backend_sampling`).

        Raises `EngineError` if llama.cpp cannot make it, which nearly always means memory.
        """
        cells = -(-config.ctx_tokens // KV_PADDING) * KV_PADDING
        params = lib.llama_context_default_params()
        params.n_ctx = cells * slots if shared_cells is None else -(-shared_cells // KV_PADDING) * KV_PADDING
        params.n_batch = max(config.batch_tokens, slots)
        params.n_ubatch = min(params.n_batch, max(config.ubatch_tokens, 1))
        params.n_seq_max = slots
        # Sizes the buffer for logits: without it llama.cpp reserves a row for each token of a micro-batch.
        params.n_outputs_max = self._outputs = outputs or slots
        self._sampling: BackendSampling | None = None
        # Rows of several micro-batches would be pieces of which only the last one's are left.
        if chooses and self._outputs <= min(model.vocab_tokens, params.n_ubatch):
            self._sampling = BackendSampling(
                slots, self._outputs, model.vocab_tokens, np.flatnonzero(model.eog_table())
            )
            self._sampling.attach(params)
            params.n_outputs_max_per_seq = self._outputs
        # For passes of one token: a GPU leaves the CPU to look that up, which takes less than to wake threads for it.
        params.n_threads = threads if model.takes_turns else 1
        params.n_threads_batch = config.threads_batch or threads
        params.kv_unified = shared_cells is not None
        params.no_perf = True
        params.type_k, params.type_v = _CACHE_TYPES[config.cache_type_k], _CACHE_TYPES[config.cache_type_v]
        self._context = open_context(
            model, config, params, f"of {slots} slots and {params.n_ctx} tokens", "fewer --slots, a smaller --ctx,"
        )
        self._memory = lib.llama_get_memory(self._context)
        self._turn = model.turn
        self.asynchronous = not model.takes_turns
        self.vocab_tokens = model.vocab_tokens
        self.batch_tokens = min(params.n_batch, int(lib.llama_n_batch(self._context)))
        self._logits_address = 0
        self._checked: set[float] = set()
        self._first = 0
        """Place in the batch of the first row whose logits are wanted."""
        self._logits: npt.NDArray[np.float32] = np.empty((0, self.vocab_tokens), np.float32)
        super().__init__(self.batch_tokens)

    def decode(self, rows: int) -> int:
        """Run the first `rows` rows. Returns llama.cpp's code: 0 is success, under -1 is fatal."""
        self._batch.n_tokens = rows
        if self._sampling is not None:
            wanted = np.flatnonzero(self.wanted[:rows])
            self._first = int(wanted[0]) if wanted.size else 0
            self._sampling.expect(self.seq[wanted])
        with self._turn:
            return int(lib.llama_decode(self._context, self._batch))

    def best(self, rows: int) -> Ints | None:
        """(rows,) the token with the largest logit of each wanted row, NOT_FINITE where a logit is not. Waits for the
        GPU. None if logits are to be taken."""
        if self._sampling is None:
            return None
        best = self._sampling.best(self._context, self._first, rows)
        if self._sampling.lists not in self._checked:
            self._check(best)
        return best

    def _check(self, best: Ints) -> None:
        """The first time: does the graph of this model, on this device, give what it is meant to?"""
        assert self._sampling is not None
        self._checked.add(self._sampling.lists)
        listed = self.shortlist(best.size)
        logits = self.logits(best.size, np.arange(best.size))[best >= 0]
        top = logits.max(axis=1)
        right = bool((np.take_along_axis(logits, best[best >= 0, None], axis=1)[:, 0] == top).all())
        if listed is not None:
            ids, values = listed.listed
            right &= bool((np.take_along_axis(logits, ids[best >= 0], axis=1) == values[best >= 0]).all())
            total = np.exp(logits - top[:, None], dtype=np.float64).sum(axis=1)
            right &= bool(np.allclose(total, listed.total[best >= 0], rtol=1e-3))
            weights = np.exp((logits - top[:, None]).astype(np.float64) / listed.sums.at)
            sums = weights.reshape(len(logits), -1, listed.tokens).sum(axis=2)
            right &= bool(np.allclose(sums, listed.sums.weights[best >= 0], rtol=1e-3, atol=1e-6))
        if not right:
            raise EngineError("the GPU does not find the largest of its logits; use --no-gpu-sampling")

    def want_lists(self, wanted: bool, temperature: float = 0.0) -> None:
        """Whether shortlists are wanted from the next decode on, and for rows of which temperature; 0: of none."""
        if self._sampling is not None:
            self._sampling.want_lists(self._context, wanted, temperature)

    def shortlist(self, rows: int) -> Shortlist | None:
        """The likeliest tokens of each wanted row, if they were wanted and the device chooses. After `best`."""
        return None if self._sampling is None else self._sampling.shortlist(self._context, self._first, rows)

    def logits(self, rows: int, places: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
        """(rows, vocab_tokens) logits of the wanted rows in batch order: llama.cpp's memory until the next decode.

        Waits for the GPU. Where it chooses, only the rows at `places` are there, which None would make all.
        """
        logits = self._buffer(rows)
        if self._sampling is not None:
            self._sampling.fetch(logits, np.arange(rows) if places is None else places)
        return logits[:rows]

    def _buffer(self, rows: int) -> npt.NDArray[np.float32]:
        """llama.cpp's memory for logits on the host. Waits for the GPU."""
        pointer = lib.llama_get_logits(self._context)
        address = ctypes.addressof(pointer.contents) if pointer else 0
        if not address:
            raise EngineError("llama.cpp has no logits after a decode that succeeded")
        if address != self._logits_address:
            shape = (max(self._outputs, rows), self.vocab_tokens)
            memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
            self._logits = np.ctypeslib.as_array(memory).reshape(shape)
            self._logits_address = address
        return self._logits

    def forget(self, seq: int, first: int = 0) -> None:
        """Empty one sequence's cells, from position `first` on; all of them by default."""
        if not lib.llama_memory_seq_rm(self._memory, seq, first, -1):
            raise EngineError(f"llama.cpp cannot remove the cells of sequence {seq} from position {first} on")

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy one sequence's first `length` cells to another, whose own are emptied.

        The data is copied at the next decode, and all of it: between KV streams only a whole sequence can be.
        """
        self.forget(target)
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.forget(target, length)

    def share(self, source: int, target: int, count: int) -> None:
        """The first `count` cells of one sequence become another's too, whose own are none. Needs shared cells."""
        lib.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def clear(self) -> None:
        """Empty all cells."""
        lib.llama_memory_clear(self._memory, True)


class LlamaEncoder(BatchArrays):
    """A context that makes one vector of each sequence of a batch. Fill the batch, call `encode(n)`, then `vectors`.

    Sequences must be whole in a batch, because llama.cpp pools what it computes in one pass. All cells of a model that
    has some are one stream, so that sequences of any lengths make one pass.
    """

    def __init__(self, model: LlamaModel, config: EngineConfig, tokens: int, threads: int, pooling: int) -> None:
        """`tokens`: in a batch at least. Raises `EngineError` if llama.cpp cannot make it."""
        # llama.cpp makes room for an output of each sequence within a batch. A recurrent model has a state for each,
        # and a pass for each.
        self.sequences = min(tokens, config.slots if model.recurrent else SEQUENCES_MAX)
        # It plans a pass in which all have the same number of tokens, and aborts where it pools fewer than that makes.
        self.batch_tokens = tokens = -(-tokens // self.sequences) * self.sequences
        self.dimensions = model.dimensions
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_seq_max = self.sequences
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = pooling
        params.kv_unified = True
        params.no_perf = True
        self._context = open_context(
            model, config, params, f"for embeddings of {tokens} tokens", "a smaller --ctx and --batch,"
        )
        self._memory = lib.llama_get_memory(self._context)
        self._run = lib.llama_decode if self._memory and not model.has_encoder else lib.llama_encode
        # On a CPU each has threads of its own instead.
        self._turn = model.turn if config.split == "tensor" else nullcontext()
        super().__init__(tokens)
        self.wanted[:] = 1

    def encode(self, rows: int) -> int:
        """Run the first `rows` rows, nothing being there before them. Returns llama.cpp's code: 0 is success."""
        if self._memory:
            lib.llama_memory_clear(self._memory, False)
        self._batch.n_tokens = rows
        with self._turn:
            return int(self._run(self._context, self._batch))

    def vectors(self, count: int) -> npt.NDArray[np.float32]:
        """(count, dimensions) a copy of the vectors of sequences [0, count). Waits for the GPU."""
        vectors = np.empty((count, self.dimensions), np.float32)
        address, size = vectors.ctypes.data, vectors.strides[0]
        for seq in range(count):
            source = lib.llama_get_embeddings_seq(self._context, seq)
            if not source:
                raise EngineError("llama.cpp has no embedding of a sequence after a pass that succeeded")
            ctypes.memmove(address + seq * size, source, size)
        return vectors

    def clear(self) -> None:
        """Overwrite all cells: what is not a number in one that is masked would come back."""
        if self._memory:
            lib.llama_memory_clear(self._memory, True)
