"""llmpi's engine without llama.cpp: it takes as long as one would, and says what looks like words.

Below the real engine's code this stands in for `workers.llama`. A `SimulatedContext` is the `Decoder` that
`workers.stepper` drives: it looks at what is in a batch, waits as long as `scheduling.servicetime` says that this
takes, and gives logits. So admission, passes, stop strings, limits, cancelling, streaming and counters are the real
ones, in a process of its own that can be killed like the real one. No file is read, no GPU touched.

The vocabulary is that of bytes, and two control tokens. An answer is a letter a token; a prompt that comes as text is
as many tokens as a real vocabulary would need, and cannot be made from them again. Logits favour letters that make
words one can pronounce; now and then the end of the answer. They depend on the tokens before them and where these
stand, and on nothing else: an answer is the same whatever runs beside it, in any slot, on any rank, at any attempt. It
means nothing.

What is not simulated: memory that runs short, loading, the moving of sequences between slots, embeddings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from scheduling.errors import ModelFileError
from scheduling.servicetime import ServiceTimes
from workers.protocol import EngineConfig
from workers.sampling import uniforms

Ints = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

BYTES = 256
CONTROL = ("<|im_start|>", "<|im_end|>")
VOCAB = BYTES + len(CONTROL)
BOS, EOS = BYTES, BYTES + 1

TEXT_BYTES = 4
"""Bytes of a prompt for each of its tokens: about as many as a real vocabulary needs for English."""

END_ONCE_IN_TOKENS = 256
"""An answer that is not cut off earlier has so many tokens in the mean."""
NOISE = 6.0
"""Logits of letters that may come next are spread over so much."""
UNLIKELY = -40.0

_CONTROL = re.compile("|".join(map(re.escape, CONTROL)))
_VOWELS, _CONSONANTS = b"aeiou", b"bdfgklmnprstvz"


def _scattered(text: str) -> list[int]:
    """Tokens of a text, each of which depends on all of its bytes. The text cannot be made from them again."""
    data = text.encode("utf-8", "replace")
    data += b"\0" * (-len(data) % TEXT_BYTES)
    # Knuth's multiplicative hash: the golden ratio in 32 bits, of whose product the upper bits are the best.
    tokens: list[int] = ((np.frombuffer(data, "<u4") * np.uint32(2654435769)) >> np.uint32(24)).tolist()
    return tokens


def _grammar() -> Floats:
    """(VOCAB, VOCAB) logits of each token after each other one, without noise."""
    after = np.full((VOCAB, VOCAB), UNLIKELY, np.float32)
    vowels, consonants = list(_VOWELS), list(_CONSONANTS)
    after[:, consonants] = 0.0
    after[consonants, :] = UNLIKELY
    after[np.ix_(consonants, vowels)] = 0.0
    after[vowels, ord(" ")] = NOISE / 4
    return after


class SimulatedModel:
    """A `workers.library.Model` of bytes; its sizes are those of the model that was measured."""

    def __init__(self, times: ServiceTimes) -> None:
        self._times = times
        self.vocab_tokens = VOCAB
        self.train_ctx_tokens = times.measured.ctx_tokens
        self.model_bytes = times.measured.model_bytes
        self.cell_bytes = times.measured.cell_bytes
        self.dimensions = 0
        self.can_generate = True
        self.takes_turns = False
        self.keeps_cells = True
        self.bos, self.eos = BOS, EOS
        self.desc = f"simulated {times.measured.model_desc}"

    def chat_template(self) -> str | None:
        return None

    def eog_table(self) -> npt.NDArray[np.bool_]:
        table = np.zeros(VOCAB, np.bool_)
        table[EOS] = True
        return table

    def piece_bytes_max(self) -> int:
        return max(map(len, CONTROL))

    def control_texts(self) -> list[str]:
        return list(CONTROL)

    def token_text(self, token: int) -> str:
        return CONTROL[token - BYTES] if token >= BYTES else self.piece(token).decode("latin-1")

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < BYTES else b""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """A token for `TEXT_BYTES` bytes; one for the text of a control token if `parse_special`."""
        if not parse_special:
            return _scattered(text)
        tokens: list[int] = []
        end = 0
        for found in _CONTROL.finditer(text):
            tokens += _scattered(text[end : found.start()])
            tokens.append(BYTES + CONTROL.index(found[0]))
            end = found.end()
        return tokens + _scattered(text[end:])

    def context(
        self,
        config: EngineConfig,
        slots: int,
        threads: int,
        *,
        outputs: int | None = None,
        whole_passes: bool = False,
    ) -> SimulatedContext:
        return SimulatedContext(self._times, slots, config.ctx_tokens, max(config.batch_tokens, slots))

    def encoder(self, config: EngineConfig, tokens: int, threads: int) -> NoReturn:
        raise ModelFileError("a simulated engine generates text, and has no embeddings")

    def scoring_context(
        self, config: EngineConfig, sequences: int, threads: int, cells: int, outputs: int
    ) -> SimulatedContext:
        ctx_tokens = max(config.ctx_tokens, config.long_ctx_tokens)
        return SimulatedContext(self._times, sequences, ctx_tokens, config.batch_tokens)


class SimulatedLibrary:
    """A `workers.library.Library`."""

    def __init__(self, times: ServiceTimes) -> None:
        self._times = times

    def start(self) -> None:
        """There is nothing to start."""

    def gpu_names(self) -> list[str]:
        """One where the times are a GPU's: batches are shaped as they were when it was measured."""
        return ["simulated"] if self._times.measured.steady else []

    def load(self, config: EngineConfig) -> SimulatedModel:
        return SimulatedModel(self._times)


class SimulatedContext:
    """A `workers.stepper.Decoder` that waits instead of computing.

    What a sequence has read so far is one number for each of its cells: a sum over the tokens up to there, each
    scattered by its position. Removing the end of a sequence needs no more than forgetting it.
    """

    asynchronous = False

    def __init__(
        self,
        times: ServiceTimes,
        slots: int,
        ctx_tokens: int,
        batch_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.token: Ints = np.zeros(batch_tokens, np.int32)
        self.pos: Ints = np.zeros(batch_tokens, np.int32)
        self.seq: Ints = np.zeros(batch_tokens, np.int32)
        self.wanted: npt.NDArray[np.int8] = np.zeros(batch_tokens, np.int8)
        self._times = times
        self._clock, self._sleep = clock, sleep
        # Column p is the state before position p. Not zeroed: pages that no request reaches cost nothing.
        self._states: Keys = np.empty((slots, ctx_tokens + 1), np.uint64)
        self._states[:, 0] = 0
        self._next = np.full(slots, -1, np.int64)
        """The position after the last one that the last pass gave a sequence; -1 if it had no part in it."""
        self._grammar = _grammar()
        self._logits: Floats = np.empty((0, VOCAB), np.float32)
        self._due_s = self._clock()
        self._took_s = 0.0

    def decode(self, rows: int) -> int:
        """Take the first `rows` rows, and the time that this takes."""
        token, pos, seq = self.token[:rows], self.pos[:rows], self.seq[:rows]
        first = np.flatnonzero(np.diff(seq, prepend=-1))
        counts = np.diff(first, append=rows)
        heads, lengths = seq[first], pos[first]
        goes_on = bool((self._next[heads] == lengths).any())
        self._read(token, pos, seq, first, counts)
        self._next[:] = -1
        self._next[heads] = lengths + counts
        wanted = np.flatnonzero(self.wanted[:rows])
        self._logits = self._say(token[wanted], self._states[seq[wanted], pos[wanted] + 1])
        self._wait(self._pass_s(pos, counts, wanted.size), goes_on)
        return 0

    def _read(
        self, token: Ints, pos: Ints, seq: Ints, first: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> None:
        scattered = (uniforms(token.astype(np.uint64), pos.astype(np.int64)) * 2.0**53).astype(np.uint64)
        sums = np.cumsum(scattered, dtype=np.uint64)
        start = self._states[seq[first], pos[first]] - (sums[first] - scattered[first])
        self._states[seq, pos + 1] = sums + np.repeat(start, counts)

    def _pass_s(self, pos: Ints, counts: npt.NDArray[np.int64], chosen: int) -> float:
        """A sequence with one row decodes, one with more is read."""
        alone = np.repeat(counts == 1, counts)
        cells = pos.astype(np.int64) + 1
        return self._times.pass_s(
            decode_rows=int(np.count_nonzero(alone)),
            decode_cells=int(cells[alone].sum()),
            read_tokens=int(np.count_nonzero(~alone)),
            read_cells=int(cells[~alone].sum()),
            chosen=chosen,
        )

    def _say(self, last: Ints, states: Keys) -> Floats:
        drawn = uniforms(states[:, None], np.arange(VOCAB))
        logits: Floats = self._grammar[last] + (NOISE * drawn).astype(np.float32)
        logits[drawn[:, EOS] < 1.0 / END_ONCE_IN_TOKENS, EOS] = NOISE + 1.0
        return logits

    def _wait(self, pass_s: float, goes_on: bool) -> None:
        """Until the pass is over. What the engine's own code takes between two passes is in their times already: a pass
        begins where the one before it was due, if a sequence goes on in it. What is more than that is no such thing,
        but a machine that cannot keep up, or had nothing to do, and is not made up for."""
        now_s = self._clock()
        begins_s = max(self._due_s, now_s - self._took_s) if goes_on else now_s
        self._due_s, self._took_s = begins_s + pass_s, pass_s
        if self._due_s > now_s:
            self._sleep(self._due_s - now_s)

    def want_lists(self, wanted: bool, temperature: float = 0.0) -> None:
        """Tokens are chosen from logits."""

    def best(self, rows: int) -> None:
        """Tokens are chosen from logits."""

    def shortlist(self, rows: int) -> None:
        """Tokens are chosen from logits."""

    def logits(self, rows: int, places: npt.NDArray[np.int64] | None = None) -> Floats:
        """(rows, VOCAB) logits of the wanted rows in batch order."""
        return self._logits[:rows]

    def forget(self, seq: int, first: int = 0) -> None:
        """Cells need not be emptied, they are written before they are read. The sequence does not go on, however."""
        if not first:
            self._next[seq] = -1

    def copy(self, source: int, target: int, length: int) -> None:
        """One sequence's first `length` cells become another's, too."""
        self._states[target, : length + 1] = self._states[source, : length + 1]
        self._next[target] = self._next[source]

    def share(self, source: int, target: int, count: int) -> None:
        """The first cells of one sequence become another's, too."""
        self._states[target, : count + 1] = self._states[source, : count + 1]

    def clear(self) -> None:
        """All sequences begin again."""
        self._next[:] = -1
