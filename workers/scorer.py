"""A context that weighs tokens it is given: the log-probabilities of prompts, and of what may follow a prompt.

Nothing is generated here (but for one token, where a request with echo asks for it), so a batch is as many tokens of as
many requests as fit, and logits are wanted for the rows that say something of a token that is asked about:

- echo: each row of the prompt says what the next token's log-probability is.
- continuations: the prompt's last row says it of the first token of each, whatever their number. A continuation of more
  tokens becomes a sequence that begins with the prompt's cells; its last token is not even fed.

Sequences share cells (`workers.sequences`): the prompt of a request is computed once for all its continuations, and
what a prompt has in common with another request's, done or still being read, is computed once for both. What is known
of a common token is taken over with it.

Sharing has a price where a model gives NaN: without flash attention it comes back out of cells that are masked, so one
sequence's NaN can reach the others. Then all cells are emptied and those requests run one at a time, so that the one
that is to blame fails alone.

It drives a `ScoreDecoder` (`workers.llama_contexts.LlamaContext`, or a fake). One thread owns a scorer; what it shares
with others are the backlog, the meter and the outbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from scheduling.errors import EngineError
from scheduling.modelsize import SCORED_LOGITS_BYTES_MAX
from workers.backlog import CANCELLED, Backlog
from workers.choosing import choose
from workers.logprobs import Likely, Noted, likely
from workers.meter import Meter
from workers.parameters import Parameters
from workers.protocol import Answer, Choice, Frame
from workers.sampling import NOT_FINITE, Floats, RowSampler
from workers.scoreplan import Part, Plan, Run
from workers.seating import Decoder, failed
from workers.sequences import Sequence, Sequences
from workers.stepper import ERRORS_IN_A_ROW_MAX, Vocabulary
from workers.text import TextStream
from workers.threads import PARALLEL_ELEMENTS_MIN, Threads

OUTPUTS_MAX = 512
"""Most rows of a batch whose logits are wanted, as far as they fit into SCORED_LOGITS_BYTES_MAX."""
SEQUENCES = 64
SEQUENCES_RECURRENT = 8
"""Where a sequence has a state of a fixed size, which may be large."""


def outputs_of(vocab_tokens: int) -> int:
    """How many rows' logits are wanted at once with this vocabulary."""
    return max(1, min(OUTPUTS_MAX, SCORED_LOGITS_BYTES_MAX // (4 * vocab_tokens)))


class ScoreDecoder(Decoder, Protocol):
    """A decoder whose sequences share cells."""

    def share(self, source: int, target: int, count: int) -> None: ...


class Scorer:
    """One scoring context of the engine. `run` until the backlog is closed.

    `outputs`: most rows of a batch whose logits are wanted. `reuse`: cells can be taken over up to any place.
    """

    def __init__(
        self,
        index: int,
        decoder: ScoreDecoder,
        *,
        sequences: int,
        cells: int,
        ctx_tokens: int,
        outputs: int,
        reuse: bool,
        vocabulary: Vocabulary,
        backlog: Backlog,
        meter: Meter,
        send: Callable[[Frame], None],
        threads: Threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._decoder = decoder
        self._plan = Plan(Sequences(decoder, sequences, cells, ctx_tokens, reuse=reuse))
        self._outputs = outputs
        self._vocabulary = vocabulary
        self._backlog = backlog
        self._meter = meter
        self._send = send
        self._threads = threads
        self._clock = clock
        self._cancels_seen = 0
        self._errors_in_a_row = 0
        self._step_ended_s = 0.0
        self._started: list[int] = []
        self._finished: list[Answer] = []

    def run(self) -> None:
        """Step until the backlog is closed. Raises `EngineError` if llama.cpp cannot go on."""
        while self._backlog.wait(self._index):
            self._step_ended_s = self._clock()
            self._meter.wake(self._step_ended_s)
            while not self._backlog.closed and self.step():
                pass
            self._meter.sleep(self._clock())

    def step(self) -> bool:
        """One batch. False if there was nothing to do."""
        self._end_cancelled()
        plan = self._plan
        for task, _ in self._backlog.take(self._index, plan.free, self._clock()):
            self._started.append(task.key)
            plan.add(task)
        if not plan.runs:
            self._emit()
            return False
        self._emit()  # what has started, before it is computed: see `workers.stepper`
        began_s, used = self._clock(), len(plan.runs)
        parts = plan.parts(self._decoder.batch_tokens, self._outputs)
        rows = sum(part.count for part in parts)
        logits = self._decode(parts)
        decoded_s = now_s = self._clock()
        made = 0
        if logits is not None:
            made = self._weigh(logits, parts)
            now_s = self._clock()
        self._emit()
        ended_s = self._clock()
        self._meter.step(
            ended_s,
            prompt_tokens=rows if logits is not None else 0,
            output_tokens=made,
            slot_s=used * (ended_s - self._step_ended_s),
            decode_s=decoded_s - began_s,
            sample_s=now_s - decoded_s,
            gaps_s=np.empty(0),
        )
        self._step_ended_s = ended_s
        return True

    # ------------------------------------------------ the model's turn

    def _decode(self, parts: list[Part]) -> Floats | None:
        """The logits of all wanted rows; None if the batch was refused: then its requests have failed."""
        decoder, row, wanted = self._decoder, 0, 0
        for part in parts:
            last = row + part.count
            decoder.token[row:last] = part.sequence.tokens[part.first : part.first + part.count]
            decoder.pos[row:last] = np.arange(part.first, part.first + part.count)
            decoder.seq[row:last] = part.sequence.id
            decoder.wanted[row:last] = 0
            decoder.wanted[last - part.outputs : last] = 1
            row = last
            wanted += part.outputs
        code = decoder.decode(row)
        if code:
            self._fail_batch(parts, row, code)
            return None
        self._errors_in_a_row = 0
        return decoder.logits(wanted) if wanted else np.empty((0, 1), np.float32)

    def _fail_batch(self, parts: list[Part], rows: int, code: int) -> None:
        """llama.cpp refused a batch: its requests fail, all others of this context start again."""
        self._errors_in_a_row += 1
        if code < -1 or self._errors_in_a_row >= ERRORS_IN_A_ROW_MAX:
            raise EngineError(
                f"llama_decode {failed(code)} on {rows} tokens of {len(parts)} sequences that are scored; if "
                "memory is short, use a smaller --ctx or --batch"
            )
        for run in {id(part.run): part.run for part in parts}.values():
            self._fail(run, f"llama_decode failed with code {code}")
        self._plan.start_again()

    # ------------------------------------------------ what the logits say

    def _weigh(self, logits: Floats, parts: list[Part]) -> int:
        """Note what the rows say, and end what is complete. Returns how many tokens were made."""
        parts = [part for part in parts if part.outputs]
        if not parts:
            return 0
        rows = np.arange(len(logits))
        threads = self._threads if logits.size >= PARALLEL_ELEMENTS_MIN else Threads()
        found = likely(logits, rows, max(part.run.k for part in parts), threads)
        if found.damaged.any():
            self._isolate()
            return 0
        logprobs = found.of(logits, np.concatenate([part.targets for part in parts]))
        line, made = 0, 0
        for part in parts:
            sequence = part.sequence
            begin = part.first + part.count - part.outputs
            known = min(part.outputs, int(sequence.tokens.size) - 1 - begin)
            if known > 0:
                lines = slice(line, line + known)
                sequence.noted.put(begin + 1 - sequence.base, logprobs[lines], found, lines)
            line += part.outputs
            if not sequence.left:
                made += self._end_sequence(part.run, sequence, logits, found, line - 1)
        return made

    def _isolate(self) -> None:
        """A row is damaged. If one request ran, it is to blame; else each is run alone."""
        running = self._plan.running
        if len(running) == 1:
            self._fail(running[0], "the model gave NaN or infinite logits")
        for run in running:
            run.suspect = True
        self._plan.start_again()

    def _end_sequence(self, run: Run, sequence: Sequence, logits: Floats, found: Likely, line: int) -> int:
        """All of a sequence is in cells; its last row is `line`. Returns how many tokens were made."""
        made = 0
        if sequence is not run.trunk:
            place = next(place for place, branch in run.branches.items() if branch is sequence)
            self._plan.end_branch(run, place)
        elif run.echoes:
            run.read = True
            if run.task.limit:
                made = 1
                self._end_with_a_token(run, logits, found, line)
                return made
        else:
            run.read = True
            self._begin_continuations(run, logits, found, line)
        if run.done:
            self._finish(run, self._choices(run))
        return made

    def _begin_continuations(self, run: Run, logits: Floats, found: Likely, line: int) -> None:
        """The prompt's last row says it of the first tokens of all continuations."""
        continuations = run.task.continuations
        firsts = np.array([tokens[0] for tokens in continuations])
        logprobs = found.of(logits, firsts, np.full(firsts.size, line))
        for place, tokens in enumerate(continuations):
            noted = run.results[place] = Noted(int(tokens.size), run.k)
            noted.put(0, logprobs[place : place + 1], found, slice(line, line + 1))
            if tokens.size > 1:
                run.pending.append(place)

    def _end_with_a_token(self, run: Run, logits: Floats, found: Likely, line: int) -> None:
        """Choose the one token that follows the prompt, as any other request's first, and end the request."""
        task, vocabulary, trunk = run.task, self._vocabulary, run.trunk
        assert trunk is not None
        sampling = task.sampling
        row: Floats = logits[line : line + 1].copy()
        if sampling.ignore_eos:
            row[:, vocabulary.eog] = -np.inf
        sampler = RowSampler(sampling, task.job.seed, 0, vocabulary.eog.size)
        token = int(
            choose(row, np.arange(1), Parameters([sampler], [0], vocabulary.eog.size), lambda _: task.prompt)[0]
        )
        if token == NOT_FINITE:
            self._fail(run, "every token was ruled out for the one after the prompt")
            return
        task.first_token_s = self._clock()
        trunk.noted.put(int(task.prompt.size), found.of(logits, [token], [line]), found, slice(line, line + 1))
        ended = bool(vocabulary.eog[token]) and not sampling.ignore_eos
        stream = TextStream(sampling.stop)
        text = "" if ended else stream.push(vocabulary.pieces[token]) + stream.finish()
        reason = "stop" if ended or stream.stopped else "length"
        self._finish(run, [self._echo(run, text, reason, token)])

    # ------------------------------------------------ answers

    def _choices(self, run: Run) -> list[Choice]:
        if run.echoes:
            return [self._echo(run, "", "length")]
        pieces, choices = self._vocabulary.pieces, []
        given = run.task.job.request.continuations
        for text, tokens, noted in zip(given, run.task.continuations, run.results, strict=True):
            assert noted is not None
            choices.append(Choice(pieces.prompt_text(text), "length", 0, noted.pack(tokens, pieces)))
        return choices

    def _echo(self, run: Run, text: str, reason: str, *made: int) -> Choice:
        """The prompt, and what was made after it."""
        assert run.trunk is not None
        pieces = self._vocabulary.pieces
        tokens = np.concatenate([run.task.prompt, np.array(made, np.int32)])
        text = pieces.prompt_text(run.task.job.request.prompt) + text
        return Choice(text, reason, len(made), run.trunk.noted.pack(tokens, pieces))

    def _finish(self, run: Run, choices: list[Choice], error: str | None = None) -> None:
        task = run.task
        self._plan.end(run)
        self._backlog.finish(self._index, task, 0, choices[0], error)
        task.choices = list(choices)
        self._finished.append(task.answer(self._clock()))

    def _fail(self, run: Run, error: str) -> None:
        run.read = False
        self._finish(run, [Choice("", "error", 0)], error)

    def _end_cancelled(self) -> None:
        if self._cancels_seen == self._backlog.cancels:
            return
        self._cancels_seen = self._backlog.cancels
        for run in [run for run in self._plan.runs if run.task.cancelled]:
            self._finish(run, [Choice("", CANCELLED, 0)])

    def _emit(self) -> None:
        if self._started or self._finished:
            self._send(Frame(started=self._started, finished=self._finished, running=self._backlog.running))
            self._started, self._finished = [], []
