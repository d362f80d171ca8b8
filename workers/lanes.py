"""What runs the lanes of an engine: contexts over its one model, each with a driver.

A lane's contexts are all made before the first of them runs: llama.cpp must not be short of memory when one of them
works already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from scheduling.errors import EngineError, ModelFileError
from scheduling.modelsize import ENCODING_CONTEXTS, SCORING_CONTEXTS_GPU
from workers.backlog import Backlog
from workers.constraints import Constraints
from workers.draft_model import DraftModel
from workers.drafting import Drafter, Drafting, PromptLookup
from workers.embedder import Embedder, Encoder
from workers.library import Model
from workers.meter import Meter
from workers.protocol import EngineConfig, FromEngine
from workers.scorer import SEQUENCES, SEQUENCES_RECURRENT, Scorer, outputs_of
from workers.shape import shape_of
from workers.shares import slots_of_contexts
from workers.speculation import ROWS_MAX, SLOTS_MAX
from workers.stepper import Stepper, Vocabulary
from workers.task import Lane
from workers.threads import Threads

ENCODED_TOKENS_GPU = 2048
"""Most tokens of a batch of inputs to embed on a GPU, as long as none of them is longer."""
ENCODERS = ENCODING_CONTEXTS
"""Contexts for embeddings: while one computes, another's vectors are copied and its next batch is made."""


class Driver(Protocol):
    """What runs one context in a thread of its own."""

    def run(self) -> None:
        """Work until the backlog is closed. Raises `EngineError` if llama.cpp cannot go on."""
        ...


class Lanes:
    """Makes drivers for the lanes of one engine. `input_tokens`: the most that an input to embed may have."""

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        draft_model: Model | None,
        *,
        on_gpu: bool,
        vocabulary: Vocabulary,
        constraints: Constraints,
        backlog: Backlog,
        meter: Meter,
        send: Callable[[FromEngine], None],
        input_tokens: int,
    ) -> None:
        self._config = config
        self._model = model
        self._draft_model = draft_model
        self._on_gpu = on_gpu
        self._vocabulary = vocabulary
        self._constraints = constraints
        self._backlog = backlog
        self._meter = meter
        self._send = send
        self._input_tokens = input_tokens

    def drivers(self, lane: Lane) -> Sequence[Driver]:
        """One for each context of `lane`. Raises `EngineError` if there is no memory for them, `ModelFileError` if the
        model cannot do what the lane is for."""
        match lane:
            case Lane.GENERATE:
                return self._steppers(lane, self._config)
            case Lane.LONG:
                return self._steppers(lane, _long(self._config))
            case Lane.EMBED:
                return self._embedders(lane)
            case Lane.SCORE:
                return self._scorers(lane)

    def _embedders(self, lane: Lane) -> list[Embedder]:
        config, model = self._config, self._model
        count = ENCODERS if self._on_gpu else min(ENCODERS, config.threads)
        batch_tokens = min(config.batch_tokens, ENCODED_TOKENS_GPU) if self._on_gpu else config.ubatch_tokens
        tokens = max(batch_tokens, self._input_tokens)
        encoders: list[Encoder] = []
        while len(encoders) < count:
            try:
                encoders.append(model.encoder(config, tokens, max(1, config.threads // count)))
            except EngineError:
                if not encoders:
                    raise
                break  # one is enough where there is no memory for more
        return [
            Embedder(
                self._backlog.open(lane),
                encoder,
                batch_tokens,
                backlog=self._backlog,
                meter=self._meter,
                send=self._send,
            )
            for encoder in encoders
        ]

    def _steppers(self, lane: Lane, config: EngineConfig) -> list[Stepper]:
        """Generating contexts as `config` says, over the model that is loaded."""
        model = self._model
        if not model.can_generate:
            raise ModelFileError(
                f"{config.model} ({model.desc}) is not a model that continues text: it can only be asked for embeddings"
            )
        shares = slots_of_contexts(config.slots, config.contexts)
        threads = config.threads if model.takes_turns else max(1, config.threads // len(shares))
        shape = shape_of(
            config,
            on_gpu=self._on_gpu,
            keeps_cells=model.keeps_cells,
            cell_bytes=model.cell_bytes,
            model_bytes=model.model_bytes,
        )
        # All of them before the first one runs: llama.cpp must not be short of memory when one of them works already.
        draftings = [self._drafting(share, threads, config) for share in shares]
        contexts = [
            model.context(
                config,
                share,
                threads,
                outputs=max(share, ROWS_MAX) if drafting is not None else None,
                whole_passes=shape.steady,
            )
            for share, drafting in zip(shares, draftings, strict=True)
        ]
        helpers = config.sampling_threads - 1
        pool = ThreadPoolExecutor(helpers * len(contexts), "choose") if helpers > 0 else None
        return [
            Stepper(
                self._backlog.open(lane),
                context,
                share,
                config.ctx_tokens,
                vocabulary=self._vocabulary,
                backlog=self._backlog,
                meter=self._meter,
                send=self._send,
                constraints=self._constraints,
                shape=shape,
                pool=pool,
                pool_threads=config.sampling_threads,
                drafting=drafting,
            )
            for context, share, drafting in zip(contexts, shares, draftings, strict=True)
        ]

    def _drafting(self, slots: int, threads: int, config: EngineConfig) -> Drafting | None:
        """How a context of so many slots drafts. What was drafted wrongly can be taken back only cell by cell."""
        model = self._draft_model if config.draft_model is not None else None
        if config.speculate == "never" or not self._model.keeps_cells:
            return None
        drafter: Drafter = PromptLookup()
        if model is not None:
            sequences = min(slots, SLOTS_MAX)
            drafter = DraftModel(model.context(config, sequences, threads), sequences, config.ctx_tokens)
        return Drafting(drafter, config.draft_max, config.speculate == "always")

    def _scorers(self, lane: Lane) -> list[Scorer]:
        """One context, and on a GPU another: what one has computed is weighed while the other computes."""
        config, model = self._config, self._model
        count = SCORING_CONTEXTS_GPU if self._on_gpu else 1
        sequences = SEQUENCES if model.keeps_cells else SEQUENCES_RECURRENT
        # Enough for a request of the longest kind and a batch beside it.
        ctx_tokens = max(config.ctx_tokens, config.long_ctx_tokens)
        cells = ctx_tokens + config.batch_tokens
        outputs = outputs_of(model.vocab_tokens)
        threads = max(1, config.threads // count)
        contexts = [model.scoring_context(config, sequences, threads, cells, outputs) for _ in range(count)]
        helpers = config.sampling_threads - 1
        pool = ThreadPoolExecutor(helpers * count, "weigh") if helpers > 0 else None
        return [
            Scorer(
                self._backlog.open(lane),
                context,
                sequences=sequences,
                cells=cells,
                ctx_tokens=ctx_tokens,
                outputs=outputs,
                reuse=model.keeps_cells,
                vocabulary=self._vocabulary,
                backlog=self._backlog,
                meter=self._meter,
                send=self._send,
                threads=Threads(pool, config.sampling_threads),
            )
            for context in contexts
        ]


def _long(config: EngineConfig) -> EngineConfig:
    """The one context of the long slots. Its steps read one micro-batch at most: those of the others come between.

    A draft model would need long caches of its own, for which nobody has set memory aside.
    """
    return msgspec.structs.replace(
        config,
        slots=config.long_slots,
        contexts=1,
        ctx_tokens=config.long_ctx_tokens,
        batch_tokens=min(config.batch_tokens, config.ubatch_tokens),
        sampling_threads=1,
        draft_model=None,
    )
