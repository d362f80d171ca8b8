"""How many tokens of prompts a step may read while other sequences wait in it for their next token.

Reading more at once is more efficient; those that decode feel it as a gap. The pace allows as many tokens as make a
step about STRETCH times as long as one that reads nothing. Cutting short prompts makes more passes than it spares
anybody: those are read in one go. And where many wait to be read, their idle slots cost more than the gaps of those
that decode. Times come in as arguments.

What reading adds to a step is a price for the pass, however little it reads, and one for each token. Both change with
the number of sequences and their lengths, and where each step reads as many tokens as the one before they cannot be
told apart. So a token's price is taken from steps in which nobody decodes, and what that leaves unexplained is the
pass's: a moving average. If a token's price is wrong, that of the pass makes up for it step by step. It is wrong as
long as only short prompts have been read, whose tokens pay for the pass: on a GPU what is allowed is then met on
average, by pieces of two sizes, since the smaller one alone would never show that more is to be had.

Without the price of a pass (tokens as many as the last ones were cheap) a GPU read 33 at a time for ever, since so few
are dear: on an H200 (8B, 32 sequences that decode) 64 tokens made a step of 10 ms 15 ms longer, 128 23, 256 32 and 512
50 ms.

Where the price of a pass alone is more than gaps allow, reading hardly anything for it would spare nobody: what takes
half as long as a step when nobody decodes is always read.
"""

from __future__ import annotations

STRETCH = 3.6
"""Steps that read, in steps that do not: the mean. Those who read a stream notice gaps of much more than 4, and the
longest of a hundred was 1.1 times the mean."""
WORTH = 0.5
"""Steps that decode, in the time that as many tokens take where nobody decodes: so many are read at least."""
FEW, MANY = 0.05, 0.3
"""Sequences that wait behind one that is read, in those that decode: up to FEW only the gaps count, from MANY on a
batch is filled."""
SHORT_TOKENS = 256
"""A prompt is short that has no more tokens to read."""
TOGETHER_TOKENS = 1024
"""So many tokens of short prompts are read in one go."""
READ_TOKENS_MIN = 32
"""Fewer are not worth a pass, and multiples of it make fewer shapes for a GPU to get used to."""
WEIGHT = 0.1
"""Of the newest measurement."""
HELD_UP = 4.0
"""A step that takes so many times as long as others was held up by something else. Taken at its word it would let whole
batches be read for as long as no other step decodes only."""
STALE = 20.0
"""A token's price is not what it was where what is read takes so many times as long. The price of a pass does not
explain that: on a GPU 32 tokens took up to 9 times as long as among many."""


class Pace:
    """One context's. `batch_tokens`: the most that a batch holds."""

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._telling_tokens = min(SHORT_TOKENS, batch_tokens)
        self._step_s = 0.0
        self._pass_s = 0.0
        self._reading_s = 0.0
        self._reading_tokens = 0.0
        self._proven = False
        self._owed_tokens = 0.0

    def observe(self, decoding: int, read_tokens: int, step_s: float) -> None:
        """A step of `step_s` seconds in which `decoding` sequences got a token and `read_tokens` were read."""
        if not decoding:
            if read_tokens >= (self._telling_tokens if self._proven else READ_TOKENS_MIN):
                self._read(read_tokens, step_s)
        elif not read_tokens:
            if not self._step_s or self._step_s > HELD_UP * step_s:
                self._step_s = step_s
            self._step_s += WEIGHT * (min(step_s, HELD_UP * self._step_s) - self._step_s)
        elif self._step_s:
            extra_s = max(0.0, step_s - self._step_s)
            told_s = read_tokens * self._token_s
            # The price of a pass may be one of many tokens, and this one of few: both must say so.
            if read_tokens >= READ_TOKENS_MIN and min(extra_s, self._pass_s + told_s) > STALE * told_s > 0.0:
                self._forget()
            known = self._proven if read_tokens >= self._telling_tokens else self._reading_tokens > 0
            if extra_s and not known:
                self._read(read_tokens, extra_s)
            unexplained_s = extra_s - read_tokens * self._token_s - self._pass_s
            # One that stood still for something else tells nothing of reading.
            most_s = (STRETCH - 1.0) * self._step_s
            self._pass_s += WEIGHT * min(most_s, max(-most_s, unexplained_s))

    def _read(self, tokens: int, seconds: float) -> None:
        """What so many tokens took tells of a token's price. Many at once prove it: what few told is forgotten."""
        if tokens >= self._telling_tokens and not self._proven:
            self._forget()
            self._proven = True
        self._reading_s += seconds - WEIGHT * self._reading_s
        self._reading_tokens += tokens - WEIGHT * self._reading_tokens

    def _forget(self) -> None:
        self._reading_s = self._reading_tokens = self._pass_s = 0.0
        self._proven = False

    @property
    def _token_s(self) -> float:
        """Seconds that a token more takes. 0: not known, or next to nothing."""
        return self._reading_s / self._reading_tokens if self._reading_tokens else 0.0

    def allowed(self, decoding: int, waiting: int = 0, short_tokens: int = 0) -> int:
        """Tokens of prompts that the next step may read, while `decoding` sequences wait for a token.

        Where batches are shaped for a GPU, `waiting`: prompts to be read, `short_tokens`: tokens left of short ones.
        """
        token_s = self._token_s
        if not decoding or not self._step_s:
            return self._batch_tokens
        spare_s = (STRETCH - 1.0) * self._step_s - self._pass_s
        # What a token takes may be unknown (only a few were ever read, say): as many as tell.
        telling = TOGETHER_TOKENS if waiting else self._telling_tokens
        tokens = max(spare_s, WORTH * self._step_s) / token_s if token_s else telling
        # One alone is no crowd, however few decode.
        tokens = max(tokens, self._batch_tokens * ((waiting - 1) / decoding - FEW) / (MANY - FEW))
        # No infinity: what a token takes may be next to nothing.
        tokens = min(float(self._batch_tokens), tokens)
        if waiting and not self._proven:
            tokens += self._owed_tokens
            self._owed_tokens = tokens % READ_TOKENS_MIN
        tokens = max(READ_TOKENS_MIN, int(tokens) // READ_TOKENS_MIN * READ_TOKENS_MIN)
        return min(self._batch_tokens, max(tokens, min(TOGETHER_TOKENS, short_tokens)))
