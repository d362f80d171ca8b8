"""A thin typed layer over llama.cpp's low-level API: model, vocabulary, contexts with their batches.

Importing this module loads llama.cpp and with it the GPU libraries: only the engine process may, after it has set
its environment. Nothing here knows requests; `LlamaContext` is the `Decoder` that `workers.stepper` drives,
`LlamaEncoder` the `Encoder` of `workers.embedder`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from scheduling.errors import EngineError, ModelFileError
from workers.protocol import EngineConfig

Ints = npt.NDArray[np.int32]

KV_PADDING = 256
"""llama.cpp rounds the cells of each sequence up to a multiple of this."""
SEQUENCES_MAX = 256
"""LLAMA_MAX_SEQ: most sequences of a context."""
POOLING: dict[str, int] = {
    "mean": lib.LLAMA_POOLING_TYPE_MEAN,
    "cls": lib.LLAMA_POOLING_TYPE_CLS,
    "last": lib.LLAMA_POOLING_TYPE_LAST,
}
_CACHE_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}
_SPLIT_MODES = {
    "layer": lib.LLAMA_SPLIT_MODE_LAYER,
    "row": lib.LLAMA_SPLIT_MODE_ROW,
    "tensor": lib.LLAMA_SPLIT_MODE_TENSOR,
}
_ROPE_SCALINGS = {
    "none": lib.LLAMA_ROPE_SCALING_TYPE_NONE,
    "linear": lib.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": lib.LLAMA_ROPE_SCALING_TYPE_YARN,
}
# ggml.h: debug 1, info 2, warning 3, error 4, 5 continues the line before.
_WARNING, _ERROR, _CONTINUED = 3, 4, 5

_recent_errors: deque[str] = deque(maxlen=4)
_last_level = 0


def _log(level: int, text: bytes, _data: Any) -> None:
    global _last_level
    if level == _CONTINUED:
        level = _last_level
    _last_level = level
    if level in (_WARNING, _ERROR):
        line = text.decode("utf-8", "replace")
        if level == _ERROR and line.strip():
            _recent_errors.append(line.strip())
        sys.stderr.write(line)


_log_callback = lib.llama_log_callback(_log)


def start_backend() -> None:
    """Initialise llama.cpp, its warnings and errors going to stderr and nothing else anywhere."""
    lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
    lib.llama_backend_init()


def recent_errors() -> str:
    """What llama.cpp last complained about, for the reason of a failure."""
    return "; ".join(_recent_errors) or "llama.cpp gave no reason"


def gpu_names() -> list[str]:
    """Devices other than the CPU that this build of llama.cpp sees, as it names them ("CUDA0")."""
    from llama_cpp._ggml import libggml

    count, get = libggml.ggml_backend_dev_count, libggml.ggml_backend_dev_get
    kind, name = libggml.ggml_backend_dev_type, libggml.ggml_backend_dev_name
    count.restype, get.restype, kind.restype, name.restype = (
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_char_p,
    )
    get.argtypes, kind.argtypes, name.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_void_p]
    devices = [get(place) for place in range(count())]
    # ggml.h: type 1 is a GPU, 2 an integrated one; 0 is the CPU, 3 an accelerator used together with it.
    return [str(name(device).decode()) for device in devices if kind(device) in (1, 2)]


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


class LlamaModel:
    """A loaded model and its vocabulary. Tokenising is thread-safe."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises `ModelFileError` if llama.cpp refuses the file, or an adapter."""
        params = lib.llama_model_default_params()
        params.n_gpu_layers = config.gpu_layers if config.gpu_layers >= 0 else 0x7FFFFFFF
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if config.use_mmap else lib.LLAMA_LOAD_MODE_NONE
        params.split_mode = _SPLIT_MODES[config.split]
        if config.tensor_split:
            shares = (ctypes.c_float * max(len(config.tensor_split), int(lib.llama_max_devices())))(
                *config.tensor_split
            )
            params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
        _recent_errors.clear()
        self._model = lib.llama_model_load_from_file(config.model.encode(), params)
        if not self._model:
            raise ModelFileError(f"llama.cpp cannot load {config.model}: {recent_errors()}")
        self._adapters = [self._load_adapter(adapter.path) for adapter in config.loras]
        self._adapter_scales = [adapter.scale for adapter in config.loras]
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_tokens = int(lib.llama_vocab_n_tokens(self._vocab))
        self.train_ctx_tokens = int(lib.llama_model_n_ctx_train(self._model))
        self.model_bytes = int(lib.llama_model_size(self._model))
        self.architecture = self.metadata("general.architecture") or ""
        self.has_encoder = bool(lib.llama_model_has_encoder(self._model))
        self.can_generate = self._continues_text()
        self.dimensions = int(lib.llama_model_n_embd_out(self._model))
        """Of an embedding."""
        self.recurrent = bool(lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        self.keeps_cells = not self.recurrent and int(lib.llama_model_n_swa(self._model)) == 0
        """Each token has a cell of its own that stays until it is removed: cells can be removed one by one."""
        heads, kv_heads = lib.llama_model_n_head(self._model), lib.llama_model_n_head_kv(self._model)
        values = int(lib.llama_model_n_embd(self._model)) * int(kv_heads) // max(1, int(heads))
        layers = int(lib.llama_model_n_layer(self._model))
        self.cell_bytes = 2 * 2 * layers * values
        """About what a token's keys and values take, in 16 bits each."""
        self.takes_turns = not (gpu_names() and not 0 <= config.gpu_layers <= layers)
        """A CPU computes: two contexts at once would take its threads from each other, and wait for them."""
        self.turn: AbstractContextManager[Any] = threading.Lock() if self.takes_turns else nullcontext()
        self.bos = int(lib.llama_vocab_bos(self._vocab))
        self.eos = int(lib.llama_vocab_eos(self._vocab))
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, buffer, len(buffer))
        self.desc = buffer.value.decode("utf-8", "replace")

    def _continues_text(self) -> bool:
        """Whether the model says which token comes next. One that sees what follows, too, says nothing (BERT), and an
        encoder's part of the work (T5) is not done here."""
        sees_ahead = self.metadata(f"{self.architecture}.attention.causal") == "false"
        sees_ahead = sees_ahead or self.architecture == "gemma-embedding"  # which its files need not say
        decodes = lib.llama_model_has_decoder(self._model) and not lib.llama_model_is_diffusion(self._model)
        return bool(decodes and not self.has_encoder and not sees_ahead)

    @property
    def handle(self) -> Any:
        return self._model

    def metadata(self, key: str) -> str | None:
        """A value of the file as llama.cpp writes it ("true", "4"); None if the file does not say."""
        buffer = ctypes.create_string_buffer(256)
        length = int(lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer)))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def _load_adapter(self, path: str) -> Any:
        _recent_errors.clear()
        adapter = lib.llama_adapter_lora_init(self._model, path.encode())
        if not adapter:
            raise ModelFileError(f"llama.cpp cannot load the adapter {path}: {recent_errors()}")
        return adapter

    def adapt(self, context: Any) -> None:
        """Have a context of this model use its adapters."""
        if not self._adapters:
            return
        count = len(self._adapters)
        adapters = (lib.llama_adapter_lora_p_ctypes * count)(*self._adapters)
        scales = (ctypes.c_float * count)(*self._adapter_scales)
        if lib.llama_set_adapters_lora(context, adapters, count, scales):
            raise EngineError("llama.cpp cannot use the adapters in a context")

    def chat_template(self) -> str | None:
        """The template in the file, if it has one."""
        template = lib.llama_model_chat_template(self._model, None)
        return None if template is None else str(template.decode("utf-8", "replace"))

    def eog_table(self) -> npt.NDArray[np.bool_]:
        """(vocab_tokens,) which tokens end a generation."""
        return np.array([lib.llama_vocab_is_eog(self._vocab, t) for t in range(self.vocab_tokens)], np.bool_)

    def piece_bytes_max(self) -> int:
        """No token stands for more bytes of text than this."""
        texts = (lib.llama_vocab_get_text(self._vocab, t) for t in range(self.vocab_tokens))
        return max((len(text) for text in texts if text), default=1)

    def control_texts(self) -> list[str]:
        """The texts of all control tokens."""
        control = (t for t in range(self.vocab_tokens) if lib.llama_vocab_is_control(self._vocab, t))
        return [self.token_text(t) for t in control]

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it; "" for a negative id, llama.cpp's 'there is none'."""
        if token < 0:
            return ""
        text = lib.llama_vocab_get_text(self._vocab, token)
        return "" if text is None else str(text.decode("utf-8", "replace"))

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for a control token."""
        for size in (64, 4096, 1 << 20):
            buffer = ctypes.create_string_buffer(size)
            length = int(lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False))
            if length >= 0:
                return buffer.raw[:length]
        return b""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`."""
        data = text.encode("utf-8", "replace")
        capacity = len(data) + 8
        tokens = np.empty(capacity, np.int32)
        pointer = tokens.ctypes.data_as(lib.llama_token_p)
        count = int(lib.llama_tokenize(self._vocab, data, len(data), pointer, capacity, add_special, parse_special))
        if count < 0:
            tokens = np.empty(-count, np.int32)
            pointer = tokens.ctypes.data_as(lib.llama_token_p)
            count = int(lib.llama_tokenize(self._vocab, data, len(data), pointer, -count, add_special, parse_special))
        ids: list[int] = tokens[: max(count, 0)].tolist()
        return ids

    def context(self, config: EngineConfig, slots: int, threads: int, *, outputs: int | None = None) -> LlamaContext:
        """A context over this model. Raises `EngineError` if llama.cpp cannot make it."""
        return LlamaContext(self, config, slots, threads, outputs=outputs)

    def encoder(self, config: EngineConfig, tokens: int, threads: int) -> LlamaEncoder:
        """A context for embeddings, batches of up to `tokens`. Raises `EngineError` if llama.cpp cannot make it,
        `ModelFileError` if the model has none."""
        return LlamaEncoder(self, config, tokens, threads, pooling_of(self, config))

    def scoring_context(
        self, config: EngineConfig, sequences: int, threads: int, cells: int, outputs: int
    ) -> LlamaContext:
        return LlamaContext(self, config, sequences, threads, shared_cells=cells, outputs=outputs)


class Llama:
    """The `workers.library.Library` that computes."""

    def start(self) -> None:
        start_backend()

    def gpu_names(self) -> list[str]:
        return gpu_names()

    def load(self, config: EngineConfig) -> LlamaModel:
        return LlamaModel(config)


def pooling_of(model: LlamaModel, config: EngineConfig) -> int:
    """How an input's one vector is made of its tokens', as llama.cpp's number: as `config` says, else as the file does,
    else their mean.

    Raises `ModelFileError` for a model that gives scores instead of vectors.
    """
    if config.pooling is not None:
        return POOLING[config.pooling]
    kind = int(model.metadata(f"{model.architecture}.pooling_type") or POOLING["mean"])
    if kind == lib.LLAMA_POOLING_TYPE_RANK:
        raise ModelFileError(
            f"{config.model} is a model that ranks, with no embeddings of its own; --pooling mean|cls|last makes some"
        )
    return kind if kind in POOLING.values() else POOLING["mean"]


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
    ) -> None:
        """`shared_cells`: cells for all sequences together, of which several can hold the same one; None gives each
        sequence its own. `outputs`: most rows of a batch whose logits are wanted; None is one for each slot.

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
        params.n_threads = threads
        params.n_threads_batch = config.threads_batch or threads
        params.kv_unified = shared_cells is not None
        params.no_perf = True
        params.type_k, params.type_v = _CACHE_TYPES[config.cache_type_k], _CACHE_TYPES[config.cache_type_v]
        set_attention(params, config)
        _recent_errors.clear()
        self._context = lib.llama_init_from_model(model.handle, params)
        if not self._context:
            raise EngineError(
                f"llama.cpp cannot make a context of {slots} slots and {params.n_ctx} tokens: {recent_errors()}. "
                "Use fewer --slots, a smaller --ctx, or fewer --gpu-layers"
            )
        model.adapt(self._context)
        self._memory = lib.llama_get_memory(self._context)
        self._turn = model.turn
        self.vocab_tokens = model.vocab_tokens
        self.batch_tokens = min(params.n_batch, int(lib.llama_n_batch(self._context)))
        self._logits_address = 0
        self._logits: npt.NDArray[np.float32] = np.empty((0, self.vocab_tokens), np.float32)
        super().__init__(self.batch_tokens)

    def decode(self, rows: int) -> int:
        """Run the first `rows` rows. Returns llama.cpp's code: 0 is success, under -1 is fatal."""
        self._batch.n_tokens = rows
        with self._turn:
            return int(lib.llama_decode(self._context, self._batch))

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """(rows, vocab_tokens) logits of the wanted rows in batch order: llama.cpp's memory until the next decode.

        Waits for the GPU.
        """
        pointer = lib.llama_get_logits(self._context)
        address = ctypes.addressof(pointer.contents) if pointer else 0
        if not address:
            raise EngineError("llama.cpp has no logits after a decode that succeeded")
        if address != self._logits_address:
            shape = (max(self._outputs, rows), self.vocab_tokens)
            memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
            self._logits = np.ctypeslib.as_array(memory).reshape(shape)
            self._logits_address = address
        return self._logits[:rows]

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
        """`tokens`: most in a batch. Raises `EngineError` if llama.cpp cannot make it."""
        self.batch_tokens = tokens
        # llama.cpp makes room for an output of each sequence within a batch. A recurrent model has a state for each,
        # and a pass for each.
        self.sequences = min(tokens, config.slots if model.recurrent else SEQUENCES_MAX)
        self.dimensions = model.dimensions
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_seq_max = self.sequences
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = pooling
        params.kv_unified = True
        params.no_perf = True
        set_attention(params, config)
        _recent_errors.clear()
        self._context = lib.llama_init_from_model(model.handle, params)
        if not self._context:
            raise EngineError(
                f"llama.cpp cannot make a context for embeddings of {tokens} tokens: {recent_errors()}. "
                "Use a smaller --ctx and --batch, or fewer --gpu-layers"
            )
        model.adapt(self._context)
        self._memory = lib.llama_get_memory(self._context)
        self._run = lib.llama_decode if self._memory and not model.has_encoder else lib.llama_encode
        super().__init__(tokens)
        self.wanted[:] = 1

    def encode(self, rows: int) -> int:
        """Run the first `rows` rows, nothing being there before them. Returns llama.cpp's code: 0 is success."""
        if self._memory:
            lib.llama_memory_clear(self._memory, False)
        self._batch.n_tokens = rows
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
