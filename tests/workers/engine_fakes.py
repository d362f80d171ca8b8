"""A decoder that needs no model, and short ways to write jobs.

The fake 'model' has 64 tokens and says after token t at position p: (t + 1) % 64. So from prompt [5] comes 6, 7, …
Token 63 ends a generation. Or it says what `next_token` makes of all tokens before, so that each of them counts.

Its memory is checked like llama.cpp's, with a stream for each sequence: positions must follow on, and a copy is of a
whole stream and takes place at the next decode.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from scheduling.requests import Request, Sampling
from workers.protocol import Job
from workers.sampling import NOT_FINITE
from workers.shortlist import Shortlist, Sums
from workers.stepper import Vocabulary
from workers.text import PieceTable

VOCAB = 64
EOG = 63


def piece_of(token: int) -> bytes:
    """Tokens 32 to 57 are the letters a to z, others are written as <number>."""
    return bytes([ord("a") + token - 32]) if 32 <= token < 58 else b"<%d>" % token


def vocabulary() -> Vocabulary:
    eog = np.zeros(VOCAB, np.bool_)
    eog[EOG] = True
    return Vocabulary(eog, PieceTable(VOCAB, piece_of))


def job(
    key: int,
    prompt: tuple[int, ...] = (5,),
    *,
    stream: bool = False,
    seed: int = 0,
    logprobs: int | None = None,
    echo: bool = False,
    **sampling: object,
) -> Job:
    options: dict[str, object] = {"max_tokens": 4, "temperature": 0.0} | sampling
    request = Request(
        custom_id=str(key),
        kind="completion",
        prompt=prompt,
        logprobs=logprobs,
        echo=echo,
        sampling=Sampling(**options),  # type: ignore[arg-type]
    )
    return Job(key, seed, stream, request)


def next_token(before: list[int]) -> int:
    """What the fake model says after these tokens, if each of them counts. Never the end."""
    found = 7
    for token in before:
        found = (31 * found + token + 1) % 1_000_003
    return found % EOG


def said_after(prompt: tuple[int, ...], count: int) -> str:
    """The text of `count` output tokens, each of which depends on all before."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return b"".join(map(piece_of, tokens[len(prompt) :])).decode()


def passes(seq: list[int]) -> int:
    """In how many passes llama.cpp computes rows of these sequences, each KV stream being apart.

    A pass takes the same number of tokens of sequences whose ids follow each other.
    """
    left = Counter(seq)
    count = 0
    while left:
        run = [min(left)]
        while run[-1] + 1 in left:
            run.append(run[-1] + 1)
        tokens = min(left[one] for one in run)
        left.subtract(dict.fromkeys(run, tokens))
        left = +left
        count += 1
    return count


def remembered(tokens: list[int]) -> npt.NDArray[np.float32]:
    """(VOCAB,) logits that differ for each sequence of tokens."""
    state = 1
    for token in tokens:
        state = (state * 31 + token + 7) % 65_521
    return np.random.default_rng(state).standard_normal(VOCAB, np.float32)


class FakeDecoder:
    """A `workers.seating.Decoder`. `batches` records the sequence ids of each decode, `emptied` the cells that went."""

    chooses = False
    """The device chooses: logits are fetched row by row."""
    asynchronous = False

    def __init__(self, batch_tokens: int = 64, ctx_tokens: int = 100, reads_all: bool = False) -> None:
        self.fetched = 0
        self.lists = False
        self.lists_at = 1.0
        self.batch_tokens = batch_tokens
        self.ctx_tokens = ctx_tokens
        self.reads_all = reads_all
        self.copies: list[tuple[int, int, int]] = []
        """(source, target, cells) of each copy."""
        self.token = np.zeros(batch_tokens, np.int32)
        self.pos = np.zeros(batch_tokens, np.int32)
        self.seq = np.zeros(batch_tokens, np.int32)
        self.wanted = np.zeros(batch_tokens, np.int8)
        self.batches: list[list[int]] = []
        self.emptied: list[tuple[int, ...]] = []
        self.codes: list[int] = []
        """Codes for the next decodes; 0 when empty."""
        self.damage: set[int] = set()
        """Sequences whose next logits are NaN. Their cells stay so, whatever comes into them, until all are emptied."""
        self._poisoned: set[int] = set()
        self.remembers = False
        """Logits depend on all tokens of the sequence, not on the last one alone."""
        self.cells: dict[int, list[int]] = {}
        self.logits_now = np.empty((0, VOCAB), np.float32)
        self._memory: dict[int, list[int]] = {}
        """What is written where the cells are: what has been emptied is still there."""
        self._pending: list[tuple[int, int]] = []

    def decode(self, rows: int) -> int:
        assert 0 < rows <= self.batch_tokens
        seq = self.seq[:rows].tolist()
        assert seq == sorted(seq), "rows of a batch must be sorted by sequence id"
        self.batches.append(seq)
        if self.codes and (code := self.codes.pop(0)):
            return code
        for source, target in self._pending:
            self._memory[target] = list(self._memory[source])
        self._pending.clear()
        out = []
        for row, one in enumerate(seq):
            cells, memory = self.cells.setdefault(one, []), self._memory.setdefault(one, [])
            assert self.pos[row] == len(cells), "positions must follow on"
            cells.append(int(self.token[row]))
            memory[len(cells) - 1 :] = cells[-1:]
            assert memory == cells, "what is attended to is not what was asked for"
            assert len(cells) <= self.ctx_tokens, "no cell is left"
            if self.wanted[row]:
                logits = np.arange(VOCAB, dtype=np.float32) / VOCAB
                logits[next_token(cells) if self.reads_all else (self.token[row] + 1) % VOCAB] = 9.0
                if self.remembers:
                    logits += remembered(cells)
                if one in self.damage:
                    self.damage.discard(one)
                    self._poisoned.add(one)
                if one in self._poisoned:
                    logits[3] = np.nan
                out.append(logits)
        self.logits_now = np.array(out, np.float32).reshape(-1, VOCAB)
        return 0

    def want_lists(self, wanted: bool, temperature: float = 0.0) -> None:
        self.lists = wanted
        self.lists_at = temperature or 1.0

    def shortlist(self, rows: int) -> Shortlist | None:
        """Of groups of one token, for which a random number of groups is listed."""
        assert self.chooses
        if not self.lists:
            return None
        logits = np.nan_to_num(self.logits_now, nan=0.0)
        count = int(np.random.default_rng(len(self.batches)).integers(2, VOCAB))
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        listed = np.take_along_axis(logits, ids, axis=1)
        room = np.full_like(logits, 1e9)
        room[:, :count] = listed
        top = logits.max(axis=1)
        total = np.exp(logits - top[:, None]).sum(axis=1).astype(np.float64)
        weights = np.exp((logits - top[:, None]) / np.float32(self.lists_at))
        sums = Sums(self.lists_at, weights, logits[:, [EOG]], lambda row, group: logits[row, group : group + 1])
        return Shortlist(ids.astype(np.int32), listed, room, 1, top, total, sums)

    def best(self, rows: int) -> npt.NDArray[np.int32] | None:
        if not self.chooses:
            return None
        assert rows == len(self.logits_now)
        sound = np.isfinite(self.logits_now.sum(axis=1))
        return np.where(sound, self.logits_now.argmax(axis=1), NOT_FINITE).astype(np.int32)

    def logits(self, rows: int, places: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
        assert rows == len(self.logits_now)
        if self.chooses:
            assert places is not None, "rows are fetched where they are needed"
            fetched = np.full_like(self.logits_now, 1e9)
            fetched[places] = self.logits_now[places]
            self.fetched += places.size
            return fetched
        return self.logits_now

    def forget(self, seq: int, first: int = 0) -> None:
        cells = self.cells.pop(seq, [])
        if first > 0:
            self.cells[seq] = cells[:first]
        else:
            self.emptied.append(tuple(cells))

    def copy(self, source: int, target: int, length: int) -> None:
        cells = self.cells.get(source, [])
        assert 0 < length <= len(cells), "cells that are not there cannot be copied"
        self.copies.append((source, target, length))
        self._pending.append((source, target))
        self.cells[target] = list(cells)
        if source in self._poisoned:
            self._poisoned.add(target)
        self.forget(target, length)

    def share(self, source: int, target: int, count: int) -> None:
        assert not self.cells.get(target)
        assert len(self.cells[source]) >= count
        self.cells[target] = self.cells[source][:count]
        self._memory[target] = self._memory[source][:count]

    def clear(self) -> None:
        self.cells.clear()
        self._pending.clear()
        self._poisoned.clear()
