"""How long the requests of an input are, before a tokenizer has seen them: what slots are sized by.

A look-ahead adds each request that it reads; only counts are kept, one for each possible number of cells, however many
requests there are. The tokens of a text are estimated from its characters. The estimate is meant to be a little too
high for nearly all texts: a slot that is too large costs memory, one that is too small sends its request to the long
slots, of which there are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from scheduling.modelsize import CELLS_TOGETHER
from scheduling.requests import Request

LETTERS_PER_TOKEN = 3
"""English has four and more to a token, inflected languages and small vocabularies fewer."""
OTHER_BYTES_PER_TOKEN = 2
"""Beyond ASCII: accents, and scripts of two to four bytes a character."""
MESSAGE_TOKENS = 8
"""What a chat template adds to each message, ..."""
TEMPLATE_TOKENS = 32
"""... and once."""
TOKENS_MAX = 1 << 22

_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OTHERS = bytes(range(0x80, 0x100))
_SPACE = b" "


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a look-ahead found.

    `counts[k]`: sequences that are estimated to have up to k * 256 tokens and more than (k - 1) * 256, prompt and
    output together. `longest_tokens`: none can have more. `whole` False: there may be more requests.
    `input_tokens`: no input of a request for embeddings, which takes no slot, can have more; 0 where there is none.
    `scores`: there are requests that weigh given tokens, which has contexts of its own.
    """

    sequences: int
    counts: Mapping[int, int]
    longest_tokens: int
    whole: bool
    input_tokens: int = 0
    scores: bool = False

    def tokens_of(self, share: float) -> int:
        """The smallest multiple of 256 tokens that this share of the sequences is estimated to fit into."""
        wanted, seen = share * sum(self.counts.values()), 0
        for cells, count in sorted(self.counts.items()):
            seen += count
            if seen >= wanted:
                return cells * CELLS_TOGETHER
        return CELLS_TOGETHER

    def without(self, sequences: int) -> Lengths:
        """Of a run that has so many behind it. Which ones is not known, so lengths stay as they are."""
        return replace(self, sequences=max(1, self.sequences - sequences))


class LengthScan:
    """Collects lengths. `max_tokens_default` is the output limit of a request without one."""

    def __init__(self, max_tokens_default: int) -> None:
        self._max_tokens_default = max_tokens_default
        self._counts: dict[int, int] = {}
        self._sequences = 0
        self._longest = 0
        self._input = 0
        self._scores = False

    def add(self, request: Request) -> None:
        """One request of the input. One for embeddings takes no slot."""
        if request.inputs:
            self._input = max(self._input, *(text_or_ids_tokens(one)[1] for one in request.inputs))
            return
        likely, most = prompt_tokens(request)
        self._scores |= request.scores
        if request.continuations:
            # What follows the prompt is given: nothing is generated.
            given = [text_or_ids_tokens(one) for one in request.continuations]
            likely, most = likely + max(one for one, _ in given), most + max(one for _, one in given)
            self._add(likely, most, 0, 1)
            return
        self._add(likely, most, request.sampling.max_tokens, request.sampling.n)

    def add_text(self, text: bytes) -> None:
        """A line of a text file: the prompt of a request that gives nothing else."""
        self._add(text_tokens(text) + 1, len(text) + 1, None, 1)

    def _add(self, likely: int, most: int, max_tokens: int | None, sequences: int) -> None:
        output = self._max_tokens_default if max_tokens is None else max_tokens
        cells = -(-min(likely + output, TOKENS_MAX) // CELLS_TOGETHER)
        self._counts[cells] = self._counts.get(cells, 0) + sequences
        self._sequences += sequences
        self._longest = max(self._longest, min(most + output, TOKENS_MAX))

    def found(self, *, whole: bool) -> Lengths | None:
        """None if nothing was added."""
        if not self._sequences:
            return None
        return Lengths(self._sequences, dict(self._counts), self._longest, whole, self._input, self._scores)


def prompt_tokens(request: Request) -> tuple[int, int]:
    """Tokens that the prompt probably has at most, and those that it cannot exceed (a token is a byte, at least)."""
    if request.messages:
        texts = [message.content.encode("utf-8", "replace") for message in request.messages]
        overhead = TEMPLATE_TOKENS + MESSAGE_TOKENS * len(texts)
        return overhead + sum(map(text_tokens, texts)), 4 * overhead + sum(map(len, texts))
    return text_or_ids_tokens(request.prompt)


def text_or_ids_tokens(given: str | tuple[int, ...]) -> tuple[int, int]:
    """The same of one text, or of token ids, whose number is known."""
    if isinstance(given, str):
        text = given.encode("utf-8", "replace")
        return text_tokens(text) + 1, len(text) + 1
    return len(given), len(given)


def text_tokens(text: bytes) -> int:
    """About how many tokens `text` (UTF-8) has at most.

    Words are cut into pieces of a few letters, spaces go with the words, digits and punctuation may be tokens each.
    """
    other_than_letters = len(text.translate(None, _LETTERS))
    letters = len(text) - other_than_letters
    others = len(text) - len(text.translate(None, _OTHERS))
    spaces = text.count(_SPACE)
    # A space is a part of the word that follows, but not where several stand together.
    spaces_together = text.count(b"  ")
    single = other_than_letters - others - spaces + spaces_together
    return -(-letters // LETTERS_PER_TOKEN) + -(-others // OTHER_BYTES_PER_TOKEN) + single
