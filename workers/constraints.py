"""Which tokens may come next, for requests whose text has to follow a grammar or a schema.

llguidance does the work: its matchers know, after each token, the set of tokens with which the text can still become
whole. A `Grammar` is made once (`Constraints.grammar`, in the preparing thread), each choice has a `Matcher` of it. A
step asks for the masks of all its constrained rows at once (`Constraints.allowed`), forbids every other token, and
tells the matchers what was chosen. EOS is in a mask exactly when the text is whole.

What a grammar may cost is bounded: it is compiled in `workers.trial` first; `LIMITS` bound each mask; and a matcher
that keeps taking long ends its request (`Matcher.measure`). An error of a matcher is never more than its request's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper

from scheduling.constraints import Constraint
from scheduling.errors import RequestError
from workers.confined import on_stack
from workers.lark import to_lark
from workers.sampling import Floats, Ids, Tokens
from workers.threads import ALONE, Threads
from workers.trial import LIMITS, STACK_BYTES, Trial, in_plain_words

Masks = npt.NDArray[np.uint8]
"""(rows, bytes): a bit for each token, lowest first."""

_NAMES = {"schema": "the JSON schema", "grammar": "the grammar"}
_PARAMS = {"schema": "json_schema", "grammar": "grammar"}

STUCK = -2
"""Stands for a token where a constrained text cannot go on. Its matcher says why."""
GRAMMARS_KEPT = 32
SLOW_S = 0.05
"""Masks of a step that take longer make the next ones be measured one by one."""
MEASURED_STEPS = 16
FREE_S = 0.02
"""What a token may cost for nothing, in processor time. Most take a thousandth of it."""
BUDGET_S = 2.0
"""What all tokens of a text, or one token of all its grammar's texts, may cost beyond."""
TOO_SLOW = f"it is too complex: more than {BUDGET_S:g} s were spent on it, beyond {FREE_S * 1e3:g} ms a token"
FEW = 32
"""A mask with at most a FEW-th of its bytes of one kind is read token by token."""


class Grammar:
    """A compiled constraint. `name` is what people call it.

    spoiled: a text of it has failed; the next request gets a new one, since what copies share may have grown too large.
    too_slow: its texts fail, running and new ones. excess_s: what the present step has cost beyond what is free.
    """

    def __init__(self, name: str, native: LLMatcher) -> None:
        self.name = name
        self.spoiled = False
        self.too_slow = False
        self.excess_s = 0.0
        self._native = native

    def start(self) -> Matcher:
        """A matcher for a new text: a copy that shares what is learnt about the vocabulary, so it costs nothing."""
        return Matcher(self, self._native.deep_copy())


class Matcher:
    """Where one text stands. `ended`: it is whole and nothing can follow. `error`: why it cannot go on. `fresh`: no
    mask of it has been made."""

    __slots__ = ("ended", "error", "fresh", "grammar", "native", "_spent_s")

    def __init__(self, grammar: Grammar, native: LLMatcher) -> None:
        self.ended = False
        self.error = ""
        self.fresh = True
        self.grammar = grammar
        self.native = native
        self._spent_s = 0.0

    @property
    def over(self) -> bool:
        return self.ended or self.error != ""

    def consume(self, token: int) -> None:
        """The text goes on with `token`. Sets `ended` or `error`."""
        self.measure(self.native.consume_token, token)
        self.check()
        self.ended = not self.error and self.native.is_stopped()

    def measure(self, work: Callable[..., object], *args: object) -> None:
        """Do some work for this text and book its processor time. Who takes too much fails, with all of its grammar."""
        grammar = self.grammar
        if not grammar.too_slow:
            began_s = time.thread_time()
            work(*args)
            excess_s = max(0.0, time.thread_time() - began_s - FREE_S)
            self._spent_s += excess_s
            grammar.excess_s += excess_s
            grammar.too_slow = max(self._spent_s, grammar.excess_s) > BUDGET_S
        if grammar.too_slow:
            self.fail(TOO_SLOW)

    def check(self) -> None:
        """Note what llguidance has to complain about."""
        if not self.error and self.native.is_error():
            self.fail(f"it cannot be followed any further: {in_plain_words(self.native.get_error())}")

    def fail(self, why: str) -> None:
        """The text cannot go on."""
        self.error = f"{self.grammar.name}: {why}"
        self.grammar.spoiled = True


class Constraints:
    """All that an engine's threads need for constrained requests. Nothing is made before the first of them.

    `pieces`: a token's bytes, none for control tokens. `ends`: tokens that end a generation. `threads`: how many work
    at the masks of a step.
    """

    def __init__(self, vocab_tokens: int, pieces: Callable[[int], bytes], ends: Sequence[int], threads: int) -> None:
        self._vocab_tokens = vocab_tokens
        self._pieces = pieces
        self._ends = list(ends)
        self._threads = threads
        self._trial = Trial()
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._known: OrderedDict[Constraint, Grammar | RequestError] = OrderedDict()
        self._measured_left = 0

    # ------------------------------------------------ the preparing thread's side

    def grammar(self, constraint: Constraint) -> Grammar:
        """Raises `RequestError` if llguidance cannot compile it, or not within its limits, or if it was too slow."""
        known = self._known.pop(constraint, None)
        if isinstance(known, Grammar) and known.too_slow:
            known = RequestError(f"{known.name}: {TOO_SLOW}", _PARAMS[constraint.kind])
        if known is None or (isinstance(known, Grammar) and known.spoiled):
            known = self._compile(constraint)
        self._known[constraint] = known
        if len(self._known) > GRAMMARS_KEPT:
            self._known.popitem(last=False)
        if isinstance(known, RequestError):
            raise RequestError(str(known), known.param)
        return known

    def _compile(self, constraint: Constraint) -> Grammar | RequestError:
        name, param = _NAMES[constraint.kind], _PARAMS[constraint.kind]
        if not self._ends:
            return RequestError(f"{name} cannot be used: this model has no token that ends a text", param)
        lark = to_lark(constraint)
        if reason := self._trial.reason(lark):
            return RequestError(f"{name} cannot be used: {reason}", param)
        tokenizer = self._tokenizer = self._tokenizer or self._make_tokenizer()
        self._executor = self._executor or LLExecutor(self._threads)
        native = on_stack(4 * STACK_BYTES, lambda: LLMatcher(tokenizer, lark, log_level=0, limits=LIMITS))
        if native.is_error():
            return RequestError(f"{name} cannot be used: {in_plain_words(native.get_error())}", param)
        return Grammar(name, native)

    def _make_tokenizer(self) -> LLTokenizer:
        vocabulary = _Vocabulary([self._pieces(token) for token in range(self._vocab_tokens)], self._ends)
        return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._ends)

    # ------------------------------------------------ the stepping threads' side

    def allowed(self, matchers: Sequence[Matcher | None]) -> Allowed | None:
        """What may come next in the texts of a step, None standing for one that may be anything."""
        found = {place: matcher for place, matcher in enumerate(matchers) if matcher is not None}
        if not found:
            return None
        constrained = list(found.values())
        return Allowed(np.array(list(found)), constrained, self._masks(constrained))

    def _masks(self, matchers: Sequence[Matcher]) -> Masks:
        """A line for each of `matchers`. One that fails has its `error` set; its line means nothing."""
        assert self._executor is not None
        masks = np.zeros((len(matchers), -(-self._vocab_tokens // 32)), np.uint32)
        together = []
        for place, matcher in enumerate(matchers):
            matcher.grammar.excess_s = 0.0
            if matcher.fresh or self._measured_left > 0:
                matcher.fresh = False
                matcher.measure(matcher.native.unsafe_compute_mask_ptr, masks[place].ctypes.data, masks[place].nbytes)
            else:
                together.append((matcher.native, place))
        self._measured_left = max(0, self._measured_left - 1)
        if together:
            began_s = time.perf_counter()
            self._executor.unsafe_compute_mask_ptr(together, masks.ctypes.data, masks[0].nbytes, len(matchers))
            if time.perf_counter() - began_s > SLOW_S:
                self._measured_left = MEASURED_STEPS
        for mask, matcher in zip(masks, matchers, strict=True):
            matcher.check()
            if not matcher.error and not mask.any():
                matcher.fail("no token of this model can come next")
        return masks.view(np.uint8)


@dataclass(frozen=True)
class Allowed:
    """What a step's constrained texts may go on with. `places`: theirs among the outputs of the step."""

    places: Ids
    matchers: list[Matcher]
    masks: Masks

    def forbid_others(self, logits: Floats, rows: Ids, threads: Threads = ALONE) -> None:
        """Set the logits of all other tokens to -inf. `rows`: places in `logits` of all outputs of the step."""
        mine = rows[self.places]

        def part(first: int, last: int) -> None:
            for place in range(first, last):
                _forbid(logits[mine[place]], self.masks[place])

        threads.spread(part, mine.size)

    def consume(self, tokens: Tokens) -> None:
        """Tell the matchers what was chosen. Where one has failed, the token becomes STUCK."""
        for place, matcher in zip(self.places.tolist(), self.matchers, strict=True):
            if matcher.error:
                tokens[place] = STUCK
            elif tokens[place] >= 0:
                matcher.consume(int(tokens[place]))


class _Vocabulary:
    """What `TokenizerWrapper` asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, pieces: list[bytes], ends: list[int]) -> None:
        # The byte 0xFF, which is in no text, marks a token that stands for none.
        self.tokens = [piece or b"\xff<%d>" % token for token, piece in enumerate(pieces)]
        self.eos_token_id = ends[0]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text. Asked only about texts that are certain, of which nothing is made here (see `HEAD`)."""
        return []


def _forbid(row: Floats, mask: npt.NDArray[np.uint8]) -> None:
    """Set what is not in `mask` to -inf."""
    # Most masks allow a handful of tokens, or all but a handful.
    some = np.flatnonzero(mask)
    if some.size <= mask.size // FEW:
        allowed = _tokens(mask, some, row.size)
        kept = row[allowed]
        row.fill(-np.inf)
        row[allowed] = kept
        return
    lacking = np.flatnonzero(mask != 0xFF)
    if lacking.size <= mask.size // FEW:
        row[_tokens(~mask, lacking, row.size)] = -np.inf
    else:
        bits = np.unpackbits(mask, bitorder="little", count=row.size).view(np.bool_)
        np.copyto(row, -np.inf, where=~bits)


def _tokens(mask: npt.NDArray[np.uint8], places: Ids, vocab_tokens: int) -> Ids:
    """The tokens whose bits are set in the bytes at `places`."""
    bits = np.flatnonzero(np.unpackbits(mask[places], bitorder="little"))
    tokens: Ids = places[bits >> 3] * 8 + (bits & 7)
    return tokens[tokens < vocab_tokens]
