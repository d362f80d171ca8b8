"""How many tokens of prompts a step may read while other sequences wait in it for their next token.

Reading more at once is more efficient; those that decode feel it as a gap. The pace measures what a step takes without
reading, and what each token that is read adds, and allows as many as make a step at most STRETCH times as long. Cutting
short prompts makes more passes than it spares anybody: those are read in one go. And where many wait to be read, their
idle slots cost more than the gaps of those that decode. The measures are moving averages, since they change with the
number of sequences and their lengths. Times come in as arguments.

On a GPU a pass that reads has a price of its own, however little it reads: on an H200 (8B, 16 sequences that decode) 75
tokens made a step 21 ms longer, and 546, reckoned from P99 of the gaps, about 30 ms. If that price alone is all that
gaps allow, reading hardly anything for it would spare nobody. So what takes half as long as a step when nobody decodes
is always read.
"""

from __future__ import annotations

STRETCH = 3.0
"""Steps that read, in steps that do not: the mean. Those who read a stream notice gaps of much more than 4, and the
longest of a hundred was about 1.25 times the mean where two contexts shared a GPU."""
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


class Pace:
    """One context's. `batch_tokens`: the most that a batch holds."""

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._step_s = 0.0
        self._token_s = 0.0
        self._reading_s = 0.0
        self._reading_tokens = 0.0

    def observe(self, decoding: int, read_tokens: int, step_s: float) -> None:
        """A step of `step_s` seconds in which `decoding` sequences got a token and `read_tokens` were read."""
        if not decoding:
            if read_tokens >= READ_TOKENS_MIN:
                # Not quite the same, but known before the first long prompt comes between others.
                self._token_s = _moved(self._token_s, step_s / read_tokens)
                self._reading_s = (1.0 - WEIGHT) * self._reading_s + step_s
                self._reading_tokens = (1.0 - WEIGHT) * self._reading_tokens + read_tokens
            return
        if not read_tokens:
            self._step_s = _moved(self._step_s, step_s)
        elif self._step_s:
            self._token_s = _moved(self._token_s, max(0.0, step_s - self._step_s) / read_tokens)

    def allowed(self, decoding: int, waiting: int = 0, short_tokens: int = 0) -> int:
        """Tokens of prompts that the next step may read, while `decoding` sequences wait for a token.

        Where batches are shaped for a GPU, `waiting`: prompts to be read, `short_tokens`: tokens left of short ones.
        """
        if not decoding or not self._step_s or not self._token_s:
            return self._batch_tokens
        # Where steps that read take no longer than one without once did, a token takes next to nothing.
        tokens = min(float(self._batch_tokens), (STRETCH - 1.0) * self._step_s / self._token_s)
        if self._reading_s:
            tokens = max(tokens, WORTH * self._step_s * self._reading_tokens / self._reading_s)
        # One alone is no crowd, however few decode.
        tokens = max(tokens, self._batch_tokens * ((waiting - 1) / decoding - FEW) / (MANY - FEW))
        tokens = max(READ_TOKENS_MIN, int(tokens) // READ_TOKENS_MIN * READ_TOKENS_MIN)
        return min(self._batch_tokens, max(tokens, min(TOGETHER_TOKENS, short_tokens)))


def _moved(average: float, value: float) -> float:
    return value if not average else average + WEIGHT * (value - average)
