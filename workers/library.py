"""What an engine needs of the library that computes: llama.cpp, or the simulation of it.

`workers.llama` and `workers.simulated` both have this shape, so that everything around them - admission, passes,
choosing, stop strings, streaming, counters - is the same code, and a rank cannot tell the two apart.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from workers.embedder import Encoder
from workers.protocol import EngineConfig
from workers.scorer import ScoreDecoder
from workers.seating import Decoder


class Model(Protocol):
    """A loaded model. See `workers.llama.LlamaModel` for what each of these means."""

    vocab_tokens: int
    train_ctx_tokens: int
    model_bytes: int
    can_generate: bool
    takes_turns: bool
    keeps_cells: bool
    cell_bytes: int
    dimensions: int
    bos: int
    eos: int
    desc: str

    def chat_template(self) -> str | None: ...

    def eog_table(self) -> npt.NDArray[np.bool_]: ...

    def piece_bytes_max(self) -> int: ...

    def control_texts(self) -> list[str]: ...

    def token_text(self, token: int) -> str: ...

    def piece(self, token: int) -> bytes: ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def context(
        self,
        config: EngineConfig,
        slots: int,
        threads: int,
        *,
        outputs: int | None = None,
        whole_passes: bool = False,
    ) -> Decoder:
        """Cells for `slots` sequences of `config.ctx_tokens`. `outputs`: most rows of a batch whose logits are wanted;
        None is one for each slot. `whole_passes`: those that want logits have as many rows for each of neighbouring
        sequences, so that they are computed in one piece. Raises `EngineError` if there is no memory for them."""
        ...

    def encoder(self, config: EngineConfig, tokens: int, threads: int) -> Encoder:
        """For embeddings, batches of up to `tokens`. Raises `EngineError` if there is no memory for it,
        `ModelFileError` if the model has none."""
        ...

    def scoring_context(
        self, config: EngineConfig, sequences: int, threads: int, cells: int, outputs: int
    ) -> ScoreDecoder:
        """So many cells, which sequences share; logits are wanted for `outputs` rows at once. Raises `EngineError`."""
        ...


class Library(Protocol):
    """Where models come from."""

    def start(self) -> None:
        """Once, before anything else is asked."""
        ...

    def gpu_names(self) -> list[str]:
        """Devices other than the CPU."""
        ...

    def load(self, config: EngineConfig) -> Model:
        """Raises `ModelFileError` if the file is refused."""
        ...
