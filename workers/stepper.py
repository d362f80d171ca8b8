"""One context's loop: take requests, read pieces of prompts, decode, choose tokens, finish.

Every step reads some of the prompts, then feeds one token for each sequence. Rows are sorted by sequence id and ids
are handed out smallest first: llama.cpp cuts a batch in any other order into many small ones, which costs a factor of
ten. Which rows make a batch is `workers.passes`' business, which request sits in which slot that of `workers.seating`.

`Stepper.step` is the whole of it. Array work over all slots is done at once (`workers.slots`); Python objects are
touched only for slots that need it: those whose sampling is more than argmax, those whose text is watched
(streamed, or with stop strings), those that finish.

It drives a `Decoder` (`workers.llama_contexts.LlamaContext`, or a fake) and never sees llama.cpp itself. One thread
owns a stepper; what it shares with others are the backlog, the meter and the outbox, which have locks of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduling.errors import EngineError
from workers import passes
from workers.alone import Alone
from workers.backlog import CANCELLED, Backlog
from workers.books import Books, Made, Step
from workers.chooser import Chooser
from workers.constraints import STUCK, Constraints
from workers.drafting import Drafting
from workers.meter import Meter
from workers.pace import SHORT_TOKENS, Pace
from workers.passes import Pass
from workers.protocol import Answer, Choice, Frame, Piece
from workers.sampling import NOT_FINITE
from workers.seating import Decoder, Seat, Seating, failed
from workers.shape import Shape
from workers.slots import NOBODY, Ints, Places, SlotArrays
from workers.speculation import Check, Speculation
from workers.text import PieceTable

ERRORS_IN_A_ROW_MAX = 3


@dataclass(frozen=True)
class Vocabulary:
    """What steppers know of the vocabulary. `eog`: (vocab_tokens,) which tokens end a generation."""

    eog: npt.NDArray[np.bool_]
    pieces: PieceTable


class Stepper:
    """One context of the engine. `run` until the backlog is closed."""

    def __init__(
        self,
        index: int,
        decoder: Decoder,
        slots: int,
        ctx_tokens: int,
        *,
        vocabulary: Vocabulary,
        backlog: Backlog,
        meter: Meter,
        send: Callable[[Frame], None],
        constraints: Constraints | None = None,
        shape: Shape = Shape(),  # noqa: B008, a frozen value
        pool: ThreadPoolExecutor | None = None,
        pool_threads: int = 1,
        drafting: Drafting | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._decoder = decoder
        self._slots = SlotArrays(slots, ctx_tokens, shape)
        self._seats = Seating(index, self._slots, decoder, backlog, vocabulary.eog.size)
        self._speculation = Speculation(self._slots, drafting, decoder.batch_tokens) if drafting else None
        self._vocabulary = vocabulary
        self._chooser = Chooser(
            decoder,
            self._slots,
            self._seats,
            vocabulary.eog,
            constraints=constraints,
            pool=pool,
            pool_threads=pool_threads,
        )
        self._backlog = backlog
        self._meter = meter
        self._send = send
        self._alone = Alone(decoder, self._slots, vocabulary.eog)
        self._pace = Pace(decoder.batch_tokens)
        self._books = Books(meter, self._pace, at_once=not decoder.asynchronous)
        self._clock = clock
        self._cancels_seen = 0
        self._errors_in_a_row = 0
        self._step_ended_s = 0.0
        self._started: list[int] = []
        self._finished: list[Answer] = []
        self._pieces: list[Piece] = []

    def run(self) -> None:
        """Step until the backlog is closed. Raises `EngineError` if llama.cpp cannot go on."""
        while self._backlog.wait(self._index):
            self._step_ended_s = self._clock()
            self._meter.wake(self._step_ended_s)
            while not self._backlog.closed and self.step():
                pass
            self._books.tell()
            self._meter.sleep(self._clock())

    def step(self) -> bool:
        """One step. False if there was nothing to do."""
        self._end_cancelled()
        # Before others take the slots of donors that have ended.
        self._seats.settle()
        if self._slots.free:
            self._started += self._seats.admit(self._clock())
            if self._started:
                self._emit()  # before they are computed: whoever finds this engine dead must know what it ran
        used = self._slots.count - self._slots.free
        if not used:
            self._books.tell()
            self._emit()
            return False
        began_s = self._clock()
        decoding = self._slots.decoding
        check = self._speculation.check() if self._speculation is not None else None
        alone = NOBODY if check is not None or self._seats.noting else self._alone.slot()
        made = self._make_alone(alone) if alone != NOBODY else self._make(check, decoding, used)
        self._emit()
        ended_s = self._clock()
        cached_tokens = self._seats.cached_tokens
        self._books.enter(Step(self._step_ended_s, began_s, ended_s, used, decoding, cached_tokens, check, made))
        self._seats.cached_tokens = 0
        self._step_ended_s = ended_s
        return True

    def _make(self, check: Check | None, decoding: int, used: int) -> Made:
        """Feed the model, choose tokens, book them."""
        fed_s = self._clock()
        rows, prompt_tokens = self._feed(check, decoding)
        self._books.tell()  # of the step before, while a device computes this one
        turn = self._chooser.begin(rows) if rows is not None and rows.output_slots.size else None
        if turn is not None:
            turn.wait()
        decoded_s = now_s = self._clock()
        gaps, output_tokens, accepted = np.empty(0), 0, 0
        if rows is not None and turn is not None:
            tokens = turn.tokens()
            now_s = self._clock()
            if not prompt_tokens:
                self._time(used, check, now_s - fed_s)
            if check is None:
                output_tokens = int(np.count_nonzero(tokens >= 0))
                gaps = self._advance(rows.output_slots, tokens, now_s)
            else:
                gaps, output_tokens, accepted = self._settle(check, tokens, now_s)
        return Made(decoded_s, now_s, prompt_tokens, output_tokens, accepted, gaps)

    def _make_alone(self, slot: int) -> Made:
        """The same for the only sequence."""
        fed_s = self._clock()
        code = self._alone.feed(slot)
        if code:
            self._fail_batch([slot], 1, code)
            self._books.tell()
            failed_s = self._clock()
            return Made(failed_s, failed_s, 0, 0, 0, np.empty(0))
        self._errors_in_a_row = 0
        self._books.tell()
        self._alone.wait()
        decoded_s = self._clock()
        token = self._alone.token(slot)
        now_s = self._clock()
        self._time(1, None, now_s - fed_s)
        if token < 0:
            self._drop_failed(np.array([slot]), np.array([token], np.int32))
            return Made(decoded_s, now_s, 0, 0, 0, np.empty(0))
        gap_s = self._slots.put_one(slot, token, now_s)
        if self._vocabulary.eog.item(token) and not self._slots.ignore_eos.item(slot):
            self._finish(slot, "stop")
        elif self._slots.outputs.item(slot) >= self._slots.limit.item(slot):
            self._finish(slot, "length")
        return Made(decoded_s, now_s, 0, 1, 0, np.array([gap_s]))

    # ------------------------------------------------ the model's turn

    def _feed(self, check: Check | None, decoding: int) -> tuple[Pass | None, int]:
        """Give the model this step's batches: `check`'s, or those of a plain step. Returns the last one, if llama.cpp
        took it, and how many tokens of prompts were read."""
        slots, decoder = self._slots, self._decoder
        if check is not None:
            return (check.rows if self._decode(check.rows) else None), 0
        read_tokens = decoder.batch_tokens
        if decoding < slots.count - slots.free:  # someone has a prompt to read
            to_read = slots.to_read(SHORT_TOKENS) if slots.shape.steady else ()
            read_tokens = self._pace.allowed(decoding, *to_read)
        if passes.mixes(slots):
            rows = passes.mixed_pass(slots, decoder.batch_tokens, read_tokens)
            return (rows, rows.prompt_tokens) if self._decode(rows) else (None, 0)
        tokens = 0
        for part in passes.read_passes(slots, min(decoder.batch_tokens, read_tokens)):
            if not self._decode(part):
                return None, tokens
            tokens += part.prompt_tokens
            for slot in part.trim.tolist():
                decoder.forget(slot, int(slots.fed[slot]))
        for slot in passes.trim_idle(slots).tolist():
            decoder.forget(slot, int(slots.fed[slot]))
        last = passes.decode_pass(slots)
        if last is None or not self._decode(last):
            return None, tokens
        return last, tokens + last.prompt_tokens

    def _decode(self, rows: Pass) -> bool:
        """Give a batch to the model. False if it was refused: then its requests have failed."""
        decoder, count = self._decoder, rows.token.size
        decoder.token[:count] = rows.token
        decoder.pos[:count] = rows.pos
        decoder.seq[:count] = rows.seq
        decoder.wanted[:count] = rows.wanted
        if rows.output_slots.size:
            wanted = bool(np.count_nonzero(self._slots.listable[rows.output_slots]))
            decoder.want_lists(wanted, float(self._slots.whole_at[rows.output_slots].max()) if wanted else 0.0)
        code = decoder.decode(count)
        if code:
            self._fail_batch(rows.slots.tolist(), rows.token.size, code)
        elif rows.output_slots.size:
            # Not after one that only read: those that decode may fail all the same.
            self._errors_in_a_row = 0
        return not code

    def _fail_batch(self, taking_part: list[int], tokens: int, code: int) -> None:
        """llama.cpp refused a batch of `tokens`: its requests fail, all others of this context start again."""
        self._errors_in_a_row += 1
        if code < -1 or self._errors_in_a_row >= ERRORS_IN_A_ROW_MAX:
            raise EngineError(
                f"llama_decode {failed(code)} on {tokens} tokens of {len(taking_part)} "
                "sequences; if memory is short, use fewer --slots or a smaller --ctx"
            )
        for slot in taking_part:
            self._finish(slot, "error", f"llama_decode failed with code {code}")
        self._start_again()

    def _start_again(self) -> None:
        """Empty all cells. The tokens of those that go on, outputs included, are fed again."""
        self._decoder.clear()
        self._slots.forget_all()

    # ------------------------------------------------ tokens

    def _settle(self, check: Check, tokens: Ints, now_s: float) -> tuple[npt.NDArray[np.float64], int, int]:
        """Book what came of checked drafts, token by token, as if decoded singly: a request may end at any of them.
        Returns the gaps between tokens, and how many there were, those that had been drafted apart."""
        assert self._speculation is not None
        gaps: list[npt.NDArray[np.float64]] = []
        counts = []
        for taken, put in self._speculation.settle(check, tokens, self._decoder.forget):
            goes_on = self._slots.used[taken]
            gaps.append(self._advance(taken[goes_on], put[goes_on], now_s))
            counts.append(int(np.count_nonzero(put[goes_on] >= 0)))
        # Each round after the first one is there because what was drafted for the one before it was right.
        return np.concatenate(gaps), sum(counts), sum(counts[1:])

    def _time(self, used: int, check: Check | None, seconds: float) -> None:
        if self._speculation is not None:
            self._speculation.timed(used, check.extra if check is not None else 0, seconds)

    def _advance(self, outputs: Places, tokens: Ints, now_s: float) -> npt.NDArray[np.float64]:
        """Book the new tokens and finish what has ended. Returns the gaps between tokens in seconds."""
        slots = self._slots
        if np.count_nonzero(tokens < 0):
            outputs, tokens = self._drop_failed(outputs, tokens)
        gaps = slots.put(outputs, tokens, now_s)
        counts = slots.outputs[outputs]
        for slot in outputs[counts == 1].tolist():
            seat = self._seats[slot]
            if seat.task.first_token_s is None:
                seat.task.first_token_s = now_s
        ended = self._vocabulary.eog[tokens] & ~slots.ignore_eos[outputs]
        full = counts >= slots.limit[outputs]
        watched = slots.watched[outputs]
        over = self._over(outputs)
        for place in (ended | full | watched | over).nonzero()[0].tolist():
            slot = int(outputs[place])
            stopped = watched[place] and self._watch(slot, int(tokens[place]), bool(ended[place]))
            matcher = self._seats[slot].matcher
            if matcher is not None and matcher.error:
                self._finish(slot, "error", matcher.error)
            elif ended[place] or stopped or over[place]:
                self._finish(slot, "stop")
            elif full[place]:
                self._finish(slot, "length")
        return gaps

    def _drop_failed(self, outputs: Places, tokens: Ints) -> tuple[Places, Ints]:
        """Finish the outputs that have no token. Returns the others."""
        failed, damaged = tokens < 0, tokens == NOT_FINITE
        for slot in outputs[damaged].tolist():
            place = int(self._slots.outputs[slot]) + 1
            self._finish(slot, "error", f"the model gave NaN or infinite logits at output token {place}")
        for slot in outputs[tokens == STUCK].tolist():
            matcher = self._seats[slot].matcher
            assert matcher is not None
            self._finish(slot, "error", matcher.error)
        if damaged.any():
            # What is not a number stays one, times 0 too: without flash attention it would come back out of cells
            # that are masked. Those are emptied only by emptying all.
            self._start_again()
        return outputs[~failed], tokens[~failed]

    def _over(self, outputs: Places) -> npt.NDArray[np.bool_]:
        """Which constrained texts are over: whole, so that nothing can follow, or failed."""
        if not self._seats.constrained:
            return np.zeros(outputs.size, np.bool_)
        matchers = [self._seats[slot].matcher for slot in outputs.tolist()]
        return np.array([matcher is not None and matcher.over for matcher in matchers], np.bool_)

    def _watch(self, slot: int, token: int, ended: bool) -> bool:
        """Look at a watched slot's new text. True if a stop string has come."""
        seat = self._seats[slot]
        assert seat.stream is not None
        seat.unsent_tokens += 1
        if not ended:
            self._say(seat, seat.stream.push(self._vocabulary.pieces[token]))
        return seat.stream.stopped

    def _say(self, seat: Seat, text: str) -> None:
        if not text:
            return
        seat.parts.append(text)
        if seat.task.job.stream:
            self._pieces.append(Piece(seat.task.key, seat.choice, text, seat.unsent_tokens))
            seat.unsent_tokens = 0

    # ------------------------------------------------ out of slots

    def _end_cancelled(self) -> None:
        if self._cancels_seen == self._backlog.cancels:
            return
        self._cancels_seen = self._backlog.cancels
        for slot in self._seats.cancelled():
            self._finish(slot, CANCELLED)

    def _finish(self, slot: int, reason: str, error: str | None = None) -> None:
        seat, slots = self._seats[slot], self._slots
        outputs = slots.output_of(slot)
        if seat.stream is not None:
            self._say(seat, seat.stream.finish())
            text = "".join(seat.parts)
            if seat.stream.stopped and reason == "length":
                reason = "stop"
        else:
            last_is_text = not (outputs.size and self._vocabulary.eog[outputs[-1]] and reason == "stop")
            text = self._vocabulary.pieces.text((outputs if last_is_text else outputs[:-1]).tolist())
        if seat.task.job.request.echo:
            text = self._vocabulary.pieces.prompt_text(seat.task.job.request.prompt) + text
        noted = None if seat.noted is None else seat.noted.pack(outputs, self._vocabulary.pieces)
        result = Choice(text, reason, int(outputs.size), noted)
        self._seats.leave(slot)
        if self._backlog.finish(self._index, seat.task, seat.choice, result, error, int(slots.cached[slot])):
            self._finished.append(seat.task.answer(self._clock()))

    def _emit(self) -> None:
        if not (self._started or self._finished or self._pieces):
            return
        frame = Frame(
            started=self._started, finished=self._finished, pieces=self._pieces, running=self._backlog.running
        )
        self._started, self._finished, self._pieces = [], [], []
        self._send(frame)
