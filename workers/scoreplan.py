"""Which requests of a scoring context run, and what its next batch feeds.

A request starts when there are cells and sequence ids for it and for one continuation at a time; more of its
continuations run beside each other in what is promised to nobody. So each that has started can get to its end, whatever
the others do. Requests start in the order in which they came; one whose prompt begins as another that is still being
read waits for those cells meanwhile, and holds nobody up.

Only numbers live here: `workers.scorer` gives them to the model and reads what it says.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from workers.logprobs import Noted
from workers.sequences import Sequence, Sequences
from workers.slots import Ints
from workers.task import Task

WAIT_TOKENS_MIN = 16
"""A prompt does not wait for another to be read for less than so many common tokens."""


class Run:
    """One request. `trunk` is its prompt's sequence once it has started, `branches` those of its continuations."""

    __slots__ = ("branches", "cells", "end", "k", "pending", "read", "results", "source", "suspect", "task", "trunk")

    def __init__(self, task: Task) -> None:
        self.task = task
        request = task.job.request
        self.k = request.logprobs or 0
        longest = max((int(tokens.size) for tokens in task.continuations), default=1)
        self.cells = longest - 1
        """What a continuation needs beside the prompt, at most."""
        size = int(task.prompt.size)
        # A prompt's last token need not be fed where nothing is asked about what follows it.
        self.end = size if task.continuations or task.limit else max(1, size - 1)
        self.suspect = False
        """It may be what makes the model give NaN: it is run alone."""
        self.reset()

    def reset(self) -> None:
        """As if it had never started."""
        self.source: tuple[Sequence, int] | None = None
        """What it waits for: that so many tokens of another sequence are in cells."""
        self.trunk: Sequence | None = None
        self.read = False
        """Whether the prompt is in cells, and what follows it can be."""
        self.branches: dict[int, Sequence] = {}
        self.pending: deque[int] = deque()
        """Continuations that need a sequence and have none yet."""
        self.results: list[Noted | None] = [None] * len(self.task.continuations)

    @property
    def sequences(self) -> list[Sequence]:
        """What it has in the context."""
        return [] if self.trunk is None else [self.trunk, *self.branches.values()]

    @property
    def echoes(self) -> bool:
        return not self.task.continuations

    @property
    def done(self) -> bool:
        return self.read and not self.pending and not self.branches

    @property
    def promised(self) -> int:
        """Cells that it may still need: for its prompt, and for one continuation at a time at least."""
        assert self.trunk is not None
        live = sum(branch.end - self.trunk.end for branch in self.branches.values())
        fed = live - sum(branch.left for branch in self.branches.values())
        return self.trunk.left + max(live, self.cells if self.forks else 0) - fed

    @property
    def forks(self) -> bool:
        """Whether another continuation may still need a sequence."""
        return self.cells > 0 and (not self.read or bool(self.pending))

    @property
    def promised_ids(self) -> int:
        return int(self.forks and not self.branches)


@dataclass(frozen=True, slots=True)
class Part:
    """`count` tokens of a sequence from place `first` on, in one batch."""

    run: Run
    sequence: Sequence
    first: int
    count: int

    @property
    def outputs(self) -> int:
        """How many rows' logits are wanted: the last ones."""
        return min(self.count, max(0, self.first + self.count - self.sequence.wanted))

    @property
    def targets(self) -> Ints:
        """The tokens that those rows speak of; any where none follows."""
        tokens, last = self.sequence.tokens, self.first + self.count
        targets = tokens[last - self.outputs + 1 : last + 1]
        return targets if targets.size == self.outputs else np.append(targets, tokens[:1])


class Plan:
    """The requests of one context, and their sequences."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self.runs: list[Run] = []
        # Each needs an id for its prompt and one for a continuation, to get on.
        self._runs_max = sequences.free_ids // 2
        self._spare_cells = self._spare_ids = 0
        """Free ones that are promised to nobody. Right while a batch is being put together."""

    @property
    def free(self) -> int:
        """How many more requests can be here."""
        return self._runs_max - len(self.runs)

    def add(self, task: Task) -> None:
        self.runs.append(Run(task))

    def end(self, run: Run) -> None:
        """A request has ended. The cells of a prompt that was read to its end may serve others."""
        self.runs.remove(run)
        if run.trunk is None:
            return
        for branch in run.branches.values():
            self._sequences.drop(branch)
        if run.done:
            self._sequences.hold(run.trunk)
        else:
            self._sequences.drop(run.trunk)

    def end_branch(self, run: Run, place: int) -> None:
        """All is known of a continuation."""
        self._sequences.drop(run.branches.pop(place))

    def start_again(self) -> None:
        """Empty all cells; all requests start anew."""
        self._sequences.clear()
        for run in self.runs:
            run.reset()

    def parts(self, batch_tokens: int, outputs: int) -> list[Part]:
        """What the next batch feeds, sorted by sequence id: so many tokens at most, and rows whose logits are wanted.
        Marks them as fed. At least one request must be here."""
        sequences, started = self._sequences, self.running
        self._spare_cells = sequences.free_cells - sum(run.promised for run in started)
        self._spare_ids = sequences.free_ids - sum(run.promised_ids for run in started)
        self._start_waiting()
        parts: list[Part] = []
        rows = batch_tokens

        def feed(run: Run, sequence: Sequence) -> None:
            nonlocal rows, outputs
            silent = max(0, sequence.wanted - sequence.fed)
            count = min(sequence.left, rows, silent + outputs)
            if count:
                parts.append(Part(run, sequence, sequence.fed, count))
                sequences.feed(sequence, count)
                rows -= count
                outputs -= max(0, count - silent)

        for run in self.running:
            for sequence in run.sequences:
                feed(run, sequence)
            while rows and outputs and run.pending and self._branch(run):
                feed(run, next(reversed(run.branches.values())))
        parts.sort(key=lambda part: part.sequence.id)
        return parts

    @property
    def running(self) -> list[Run]:
        """Requests that have started."""
        return [run for run in self.runs if run.trunk is not None]

    def _start_waiting(self) -> None:
        """Start requests while there is room. Who waits for another's cells holds nobody up."""
        alone = any(run.suspect for run in self.runs)
        if alone and self.running:
            return
        for run in self.runs:
            if run.trunk is None and not self._start(run):
                return
            if alone and run.trunk is not None:
                return

    def _start(self, run: Run) -> bool:
        """Start a request, or let it wait for its source. False if there is no room."""
        prompt, end = run.task.prompt, run.end
        size = int(prompt.size)
        while (found := self._source_of(run)) is not None:
            source, shared = found
            cells, ids = end - shared + run.cells, 1 + (run.cells > 0)
            if not self._room(cells, ids) and (source is None or self.running):
                return False
            if source is not None and source.gone:  # to make room
                continue
            self._spare_cells -= cells
            self._spare_ids -= ids
            noted = Noted(size + 1, run.k) if run.echoes else Noted(0, 0)
            if run.echoes and source is not None:
                noted.copy(source.noted, shared + 1)
            run.trunk = self._sequences.start(
                prompt, source, shared, end=end, wanted=0 if run.echoes else size - 1, base=0, noted=noted
            )
            self._sequences.publish(run.trunk, run.k if run.echoes else -1)
            break
        return True

    def _source_of(self, run: Run) -> tuple[Sequence | None, int] | None:
        """Whose first cells the prompt begins with, and how many of them. None: it waits for them."""
        if run.source is not None:
            source, shared = run.source
            if source.running and source.fed < shared:
                return None
            run.source = None
        found, shared = self._sequences.find(run.task.prompt, run.end, run.k if run.echoes else -1)
        if found is None or found.fed >= shared:
            return found, shared
        if shared - found.fed < WAIT_TOKENS_MIN:
            return (found, found.fed) if found.fed else (None, 0)
        run.source = found, shared
        return None

    def _branch(self, run: Run) -> bool:
        """Start the next continuation of a request whose prompt is in cells. False if there is no room."""
        trunk, place = run.trunk, run.pending[0]
        assert trunk is not None
        tokens = run.task.continuations[place]
        size = int(tokens.size) - 1
        live = sum(branch.end - trunk.end for branch in run.branches.values())
        cells = max(live + size, run.cells) - max(live, run.cells)
        ids = 1 if run.branches else 0
        if not self._room(cells, ids):
            return False
        self._spare_cells -= cells
        self._spare_ids -= ids
        run.pending.popleft()
        noted = run.results[place]
        assert noted is not None
        run.branches[place] = self._sequences.start(
            np.concatenate([trunk.tokens, tokens]),
            trunk,
            trunk.end,
            end=trunk.end + size,
            wanted=trunk.end,
            base=trunk.end,
            noted=noted,
        )
        return True

    def _room(self, cells: int, ids: int) -> bool:
        """Whether so many are to be had without breaking a promise, after held sequences have gone if need be."""
        sequences = self._sequences
        while self._spare_cells < cells or self._spare_ids < ids:
            cells_before, ids_before = sequences.free_cells, sequences.free_ids
            if not sequences.make_room():
                return False
            self._spare_cells += sequences.free_cells - cells_before
            self._spare_ids += sequences.free_ids - ids_before
        return True
