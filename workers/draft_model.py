"""Drafts from a smaller model with the same tokenizer.

It has a context of its own with a sequence for each of the few that are drafted for. Before it drafts, it reads what
the sequence has become since the last time; what it had read that is not there any more is taken back. So nobody has
to tell it that a draft was wrong, or that a slot was moved, released or started again: it compares tokens, which takes
microseconds. Then it puts out its most likely token, again and again.

A model that drafts must not bring down the one that answers: if llama.cpp refuses a batch of it, there are no more
drafts, and that is said once.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from scheduling.errors import ModelFileError
from workers.choosing import largest
from workers.drafting import NOTHING
from workers.sampling import NOT_FINITE
from workers.slots import Ints, Places, SlotArrays

if TYPE_CHECKING:
    from workers.seating import Decoder

SAMPLES = 5
CATCH_UP_TOKENS = 32
"""A draft before which more than these had to be read, as at the beginning of a request, is no measure of time."""


class Tokenizer(Protocol):
    """What is compared of two models (`workers.llama.LlamaModel`)."""

    vocab_tokens: int
    bos: int
    eos: int

    def token_text(self, token: int) -> str: ...


def check_same_tokenizer(path: str, draft: Tokenizer, target: Tokenizer) -> None:
    """Raises `ModelFileError` if the model at `path` cannot draft for `target`."""
    problem = _difference(draft, target)
    if problem:
        raise ModelFileError(
            f"--draft-model {path} cannot draft for this model: {problem}. It needs the same tokenizer; "
            "take a smaller model of the same family"
        )


def _difference(draft: Tokenizer, target: Tokenizer) -> str:
    if draft.vocab_tokens != target.vocab_tokens:
        return f"its vocabulary has {draft.vocab_tokens:,} tokens, the model's {target.vocab_tokens:,}"
    for name, one, other in (("begin", draft.bos, target.bos), ("end", draft.eos, target.eos)):
        if one != other:
            return f"the token that {name}s a text is {one} in it, and {other} in the model"
    for token in range(target.vocab_tokens):
        text = draft.token_text(token)
        if text != target.token_text(token):
            return f"token {token} is {text!r} in it, and {target.token_text(token)!r} in the model"
    return ""


class DraftModel:
    """A `workers.drafting.Drafter` over a context of `sequences` sequences of `ctx_tokens` tokens each."""

    odds: tuple[float, ...] = (0.7,)

    def __init__(
        self, decoder: Decoder, sequences: int, ctx_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._decoder = decoder
        self._clock = clock
        self._tokens: Ints = np.empty((sequences, ctx_tokens), np.int32)
        self._fed = np.zeros(sequences, np.int64)
        """How many tokens of each sequence are in its cells."""
        self._sequence_of: dict[int, int] = {}
        """By slot."""
        self._times: deque[float] = deque(maxlen=SAMPLES)
        self._broken = False

    def offers(self, slots: SlotArrays, places: Places) -> list[int]:
        enough = places.size <= self._fed.size and not self._broken
        return [0 if enough else NOTHING] * places.size

    def seconds(self, length: int) -> float:
        times = self._times
        return length * sorted(times)[len(times) // 2] if times else 0.0

    def draft(self, slots: SlotArrays, places: Places, lengths: list[int]) -> list[Ints]:
        began_s = self._clock()
        asked = dict(zip(places.tolist(), lengths, strict=True))
        sequences = self._sequences(list(asked))
        # Rows are sorted by sequence.
        order = sorted((slot for slot in asked if asked[slot]), key=lambda slot: sequences[slot])
        drafts: dict[int, list[int]] = {slot: [] for slot in asked}
        missing = {slot: self._missing(slots.tokens[slot, : slots.length[slot]], sequences[slot]) for slot in order}
        self._read(missing, sequences, drafts)
        while order := [slot for slot in order if 0 < len(drafts[slot]) < asked[slot]]:
            tokens = self._decode([(sequences[slot], np.array(drafts[slot][-1:], np.int32), True) for slot in order])
            if not tokens:
                break
            for slot, token in zip(order, tokens, strict=True):
                drafts[slot].append(token)
        if sum(tokens.size for tokens in missing.values()) <= CATCH_UP_TOKENS:
            self._times.append((self._clock() - began_s) / max(lengths))
        return [np.array(drafts[slot], np.int32) for slot in asked]

    def _sequences(self, places: list[int]) -> dict[int, int]:
        """A sequence for each slot: the one that it had, if it had one."""
        kept = {slot: self._sequence_of[slot] for slot in places if slot in self._sequence_of}
        free = iter(sorted(set(range(self._fed.size)) - set(kept.values())))
        self._sequence_of = kept | {slot: next(free) for slot in places if slot not in kept}
        return self._sequence_of

    def _missing(self, tokens: Ints, sequence: int) -> Ints:
        """What is to be read of `tokens`, at least the last one. Cells that do not fit are emptied."""
        fed = int(self._fed[sequence])
        same = self._tokens[sequence, :fed][: tokens.size - 1] == tokens[:fed][: tokens.size - 1]
        kept = same.size if same.all() else int(same.argmin())
        if kept < fed:
            self._decoder.forget(sequence, kept)
            self._fed[sequence] = kept
        return tokens[kept:]

    def _read(self, missing: dict[int, Ints], sequences: dict[int, int], drafts: dict[int, list[int]]) -> None:
        """Give the model what is missing, as much as it takes at once, and note what it says after the last token."""
        batch: list[tuple[int, Ints, bool]] = []
        ends: list[int] = []
        room = self._decoder.batch_tokens
        waiting = deque(missing.items())
        while waiting or batch:
            if waiting and room:
                slot, tokens = waiting.popleft()
                part, rest = tokens[:room], tokens[room:]
                batch.append((sequences[slot], part, not rest.size))
                room -= part.size
                if rest.size:
                    waiting.appendleft((slot, rest))
                else:
                    ends.append(slot)
                continue
            said = self._decode(batch)
            if self._broken:
                return
            for slot, token in zip(ends, said, strict=True):
                drafts[slot].append(token)
            batch, ends, room = [], [], self._decoder.batch_tokens

    def _decode(self, parts: list[tuple[int, Ints, bool]]) -> list[int]:
        """Feed tokens to sequences. Returns the likeliest token after each part that is marked; none once broken."""
        decoder, end = self._decoder, 0
        for sequence, tokens, wanted in parts:
            first, start, end = int(self._fed[sequence]), end, end + tokens.size
            decoder.token[start:end] = tokens
            decoder.pos[start:end] = np.arange(first, first + tokens.size)
            decoder.seq[start:end] = sequence
            decoder.wanted[start:end] = 0
            decoder.wanted[end - 1] = wanted
            self._tokens[sequence, first : first + tokens.size] = tokens
            self._fed[sequence] += tokens.size
        code, count = decoder.decode(end), sum(wanted for _, _, wanted in parts)
        said = _largest(decoder, count) if count and not code else []
        if code or NOT_FINITE in said:
            self._broken = True
            why = f"llama_decode failed with code {code}" if code else "its logits are NaN or infinite"
            print(f"the draft model is not used any more: {why}", file=sys.stderr)
            return []
        return said


def _largest(decoder: Decoder, rows: int) -> list[int]:
    best = decoder.best(rows)
    tokens: list[int] = (largest(decoder.logits(rows), np.arange(rows)) if best is None else best).tolist()
    return tokens
