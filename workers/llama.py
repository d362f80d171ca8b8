"""A thin typed layer over llama.cpp's low-level API: the model and its vocabulary; `workers.llama_contexts` has what is
computed with it.

Importing this module loads llama.cpp and with it the GPU libraries: only the engine process may, after it has set
its environment. Nothing here knows requests.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from scheduling.errors import ConfigError, EngineError, ModelFileError
from workers.care import out_of_memory
from workers.llama_backend import forget_errors, gpu_names, recent_errors, start_backend
from workers.llama_contexts import LlamaContext, LlamaEncoder
from workers.longtexts import LONG_CHARACTERS, LongTexts
from workers.protocol import EngineConfig

POOLING: dict[str, int] = {
    "mean": lib.LLAMA_POOLING_TYPE_MEAN,
    "cls": lib.LLAMA_POOLING_TYPE_CLS,
    "last": lib.LLAMA_POOLING_TYPE_LAST,
}
_SPLIT_MODES = {
    "layer": lib.LLAMA_SPLIT_MODE_LAYER,
    "row": lib.LLAMA_SPLIT_MODE_ROW,
    "tensor": lib.LLAMA_SPLIT_MODE_TENSOR,
}
_TURN = threading.Lock()
"""Of all models of a process: one that drafts computes where the other does."""


class LlamaTokenizer:
    """A vocabulary's tokenizer. Thread-safe."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab

    @classmethod
    def of_file(cls, path: str) -> LlamaTokenizer:
        """Of a model of which nothing else is loaded. Raises `ModelFileError` if llama.cpp refuses the file."""
        start_backend()
        params = lib.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        model = lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise ModelFileError(f"llama.cpp cannot load {path}: {recent_errors()}")
        return cls(lib.llama_model_get_vocab(model))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. A long one can take long, much memory, or the whole stack."""
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


class LlamaModel:
    """A loaded model and its vocabulary. Tokenising is thread-safe."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises `ModelFileError` if llama.cpp refuses the file, or an adapter; `EngineError` if memory is short."""
        params = lib.llama_model_default_params()
        params.n_gpu_layers = config.gpu_layers if config.gpu_layers >= 0 else 0x7FFFFFFF
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if config.use_mmap else lib.LLAMA_LOAD_MODE_NONE
        no_devices = ctypes.c_void_p(None)
        if not config.use_devices:
            # A list that ends at once; none at all would mean every device.
            params.devices = ctypes.addressof(no_devices)
        params.split_mode = _SPLIT_MODES[config.split]
        if config.tensor_split:
            shares = (ctypes.c_float * max(len(config.tensor_split), int(lib.llama_max_devices())))(
                *config.tensor_split
            )
            params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
        forget_errors()
        self._model = lib.llama_model_load_from_file(config.model.encode(), params)
        if not self._model:
            why = f"llama.cpp cannot load {config.model}: {recent_errors()}"
            if config.split == "row" and "split buffers" in why:
                raise ConfigError(
                    "--split row: the GPU backend of this llama.cpp cannot divide matrices by rows; use --split layer, "
                    "or --split tensor"
                )
            if out_of_memory(why):
                raise EngineError(f"{why}. Use fewer --gpu-layers, more --gpus-per-rank or a model of fewer bits")
            raise ModelFileError(why)
        self._adapters = [self._load_adapter(adapter.path) for adapter in config.loras]
        self._adapter_scales = [adapter.scale for adapter in config.loras]
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._tokenizer = LlamaTokenizer(self._vocab)
        self._long_texts = LongTexts(config.model)
        self.vocab_tokens = int(lib.llama_vocab_n_tokens(self._vocab))
        self._eog: npt.NDArray[np.bool_] | None = None
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
        # Passes split by tensors talk from GPU to GPU: two contexts at once have ended in a segmentation fault.
        alone = self.takes_turns or config.split == "tensor"
        self.turn: AbstractContextManager[Any] = _TURN if alone else nullcontext()
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
        forget_errors()
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
        if self._eog is None:
            self._eog = np.array([lib.llama_vocab_is_eog(self._vocab, t) for t in range(self.vocab_tokens)], np.bool_)
        return self._eog

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
        """Token ids of `text`. Raises `RequestError` for a long one that llama.cpp cannot tokenise within bounds."""
        if len(text) > LONG_CHARACTERS:
            return self._long_texts.tokenize(text, add_special=add_special, parse_special=parse_special)
        return self._tokenizer.tokenize(text, add_special=add_special, parse_special=parse_special)

    def context(
        self,
        config: EngineConfig,
        slots: int,
        threads: int,
        *,
        outputs: int | None = None,
        whole_passes: bool = False,
    ) -> LlamaContext:
        """A context over this model. Raises `EngineError` if llama.cpp cannot make it."""
        chooses = whole_passes and self._chooses(config)
        return LlamaContext(self, config, slots, threads, outputs=outputs, chooses=chooses)

    def _chooses(self, config: EngineConfig) -> bool:
        """Whether the device finds the largest logits: where they would have to be fetched from it. A pass of a
        recurrent model is computed in pieces, and logits are where nothing finds them if they are split by tensors."""
        if self.recurrent or config.split == "tensor" or config.sample_on == "host":
            return False
        return config.sample_on == "device" or not self.takes_turns

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
