"""Rank 0 of one batch job: it checks the input, opens the run directory, starts the session, drives the loop, and
brings everything to disk before anyone is let go. Whatever goes wrong here, the other ranks are released and what was
acknowledged is safe.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import msgspec

from coordinator.batchoptions import BatchOptions
from coordinator.callbacks import Callbacks, Snapshot
from coordinator.collect import Rows
from coordinator.compressed import STDIN, STDIN_VARIABLE
from coordinator.convert import source_of
from coordinator.ending import Ending, load_ahead, size_of
from coordinator.inputfile import Format, ends_identity, only_embeddings, sniff_format
from coordinator.intervals import Intervals
from coordinator.launch import Launch
from coordinator.prepared import Prepared, prepare_input, tell_row
from coordinator.progress import ProgressView
from coordinator.rundata import copy_rows, rank_rows
from coordinator.session import Session
from coordinator.setup import Setup
from coordinator.signals import StopSignals
from coordinator.slicing.slices import WHOLE
from coordinator.slurmjobs.chain import NEXT, PREVIOUS
from coordinator.source import FileSource, same_input
from coordinator.surroundings import Surroundings
from coordinator.timekeeper import Timekeeper
from coordinator.timelimit import requeue
from coordinator.versions import package_versions
from coordinator.world import Ranks
from scheduling import events as ev
from scheduling.errors import EXIT_INFRASTRUCTURE, InputError, LlmpiError, RecordError, RunDirError
from scheduling.wording import counted
from storage.files import Disk
from storage.recovery import Recovery, recover
from storage.rundir import RunDir, holds_answers
from storage.runjson import RUN_NAME, read_run, unusable
from storage.staging import Staged


def refuse_edited_input(output: Path, source: FileSource, disk: Disk) -> dict[str, Any]:
    """Refuse to resume where the input was changed in a way that its size and ends do not show.

    Returns what is known of the input's content, from earlier sessions too.

    Raises:
        RunDirError: the run was started with another content of the same input file, or cannot be read.
        RecordError: the disk fails.
    """
    try:
        if not disk.exists(output / RUN_NAME) or not holds_answers(output, disk):
            return dict(source.identity())
    except OSError as error:
        raise unusable(output, error) from error
    before = read_run(output, disk)["details"].get("input_identity")
    if isinstance(before, dict) and not same_input(before, source.identity()):
        raise RunDirError(
            f"{output} was started with another content of the input: give another run directory, or restore the file"
        )
    return (before or {}) | source.identity()


class Lead:
    """Rank 0 of one job."""

    def __init__(
        self, setup: Setup, options: BatchOptions, launch: Launch, world: Ranks | None, staged: Staged,
        signals: StopSignals, around: Surroundings | None = None, keeper: Timekeeper | None = None,
    ) -> None:  # fmt: skip
        self._around = around = around or Surroundings()
        self._disk = around.disk
        self._setup = setup
        self._staged = staged
        self._signals = signals
        self._config = setup.config
        self._options = options
        self._launch = launch
        self._world = world
        self._view = ProgressView(sys.stderr, quiet=options.quiet)
        self.session = Session(setup, world, around=around)
        self.session.beats = True
        self._keeper = keeper or Timekeeper(options.stopping, signals, around.clock, around.wall_clock)
        self._said_stopping = False
        self._said_limit = False
        self._given = Prepared(options.input)

    def run(self) -> int:
        try:
            if self._setup.problem is not None:
                raise self._setup.problem
            for note in self._staged.notes:
                self._view.note(note)
            if self._options.replay is not None:
                self._options.replay.check(self._setup.fingerprint, self._setup.adapters)
            with contextlib.ExitStack() as undo:
                given = self._given = self._prepared_input()
                if given.held is not None:
                    undo.callback(given.held.release)
                form = "jsonl" if given.source else cast("Format", self._options.format) or sniff_format(given.path)
                source = self._open(form)
                identity = refuse_edited_input(self._options.output, source, self._disk)
                if self._options.replay is not None:
                    self._options.replay.check_content(identity)
                details = self._details() | {"input_identity": identity}
                undo.pop_all()  # the lock is the run directory's from here on
            with RunDir.create_or_resume(
                self._options.output, self._identity(form), details, held=given.held, disk=self._disk
            ) as run:
                code = self._run_in(run, source)
            self._requeue()
            return self.session.leave(code)
        except BaseException as error:
            self._view.close()
            self.session.refuse(str(error))
            self.session.close(str(error))
            self.session.leave(error.exit_code if isinstance(error, LlmpiError) else EXIT_INFRASTRUCTURE)
            raise
        finally:
            self._view.close()

    def _prepared_input(self) -> Prepared:
        """The input as a file that can be read more than once."""
        options = self._options
        source = source_of(options.input, options.format, options.columns)
        if source is None:
            return Prepared(options.input)
        return prepare_input(
            source, options.output, strict=self._config.precheck, note=self._view.note,
            check_stop=lambda: self._meanwhile("the input was checked"),
            stdin_ends=self._launch.launcher != "openmpi" or STDIN_VARIABLE in os.environ,
        )  # fmt: skip

    def _open(self, form: Format) -> FileSource:
        try:
            return FileSource(
                self._given.path, format=form, defaults=self._config.sampling, precheck=self._config.precheck,
                on_progress=lambda *_: self._meanwhile("the input was checked"), max_tokens=self._config.max_tokens,
                part=self._options.part or WHOLE,
            )  # fmt: skip
        except InputError as error:
            raise tell_row(error, self._given) from None

    def _meanwhile(self, what: str) -> None:
        """What may take long before anything is started goes on: the ranks are told, a signal or the time limit ends
        it."""
        self._keeper.check(what)
        self.session.beat()

    def _run_in(self, run: RunDir, source: FileSource) -> int:
        for note in run.notes:
            self._view.warn(note)
        disk = self._disk
        found = recover(disk, run.record_path, lambda: self._meanwhile("the record was read"))
        if source.total is not None:
            run.set_total(source.total)
            if source.total == 0:
                self._view.note(f"slice {self._options.part} has no request: there are fewer in all")
        if run.complete and run.total is not None and found.done < run.total:
            lacking = run.total - found.done
            self._view.warn(f"{run.path} was complete, but its record lacks {lacking} of {run.total} answers: going on")
            run.reopen()
        if run.complete:
            self._view.note(f"{run.path} is complete already: {found.ok} answered, {found.failed} failed")
            self.session.close("complete")
            return self._ending(run).report(found.failed)
        self._tell_resume(run, found)
        source.skip(found.states > 0)
        self.session.number = run.session
        self.session.embeds_only = only_embeddings(self._given.path, source.format)
        self.session.log_dir = run.path / "logs"
        self.session.log_dir.mkdir(exist_ok=True)
        if source.lengths is not None:
            self.session.lengths = source.lengths.without(found.done)
        for note in self.session.start(lambda: self._keeper.check("the ranks gathered")):
            self._view.warn(note)
        run.add_session_facts(self._facts())
        around = self._around
        beside = around.executor()
        beside.submit(load_ahead)
        beside.shutdown(wait=False)
        self._intervals = Intervals(
            disk, run.segments_path, run.session, self._filled, around.clock, around.executor(), self._copies
        )
        record = around.recorder(
            disk, run.record_path, around.clock, self._config.commit_interval_s, self._config.commit_bytes,
            run.check_held,
        )  # fmt: skip
        try:
            coordinator = self.session.begin(source, record, self._callbacks(run, found), earlier=found.done)
            self.session.run(self._keep_on)
        except BaseException:
            with contextlib.suppress(RecordError):  # said already, or less important than what is on its way
                record.close()
            self._intervals.close()
            raise
        record.close()
        self._view.close(coordinator.snapshot())
        return self._ending(run).finish(coordinator, source, found, self._intervals, record.fsyncs)

    def _ending(self, run: RunDir) -> Ending:
        options = self._options
        return Ending(
            self._setup, self.session, run, self._disk, self._keeper, self._around.clock, replay=options.replay,
            show=options.show, quiet=options.quiet, as_json=options.as_json, of_study=options.of_study,
        )  # fmt: skip

    # ------------------------------------------------------------ what a run is

    def _identity(self, form: Format) -> dict[str, Any]:
        made_from = {} if self._given.source is None else {"source": self._given.source}
        part = {} if self._options.part is None else {"slice": str(self._options.part)}
        return {
            "input": ends_identity(self._given.path, form) | made_from | part,
            "model": self._setup.fingerprint,
            "adapters": list(self._setup.adapters),
            "options": self._config.identity(),
        }

    def _details(self) -> dict[str, Any]:
        return {
            "command": sys.argv,
            "input": "-" if self._options.input == STDIN else str(self._options.input.resolve()),
            "cwd": str(Path.cwd()),
            "batch": {
                "format": self._options.format, "columns": asdict(self._options.columns), "ranks": self._options.ranks,
                "stopping": asdict(self._options.stopping),
            },
            "replay_of": None if self._options.replay is None else str(self._options.replay.run_dir.resolve()),
            "model": self._setup.source or self._setup.model.path,
            "model_digest": self._setup.model_digest,
            "config": msgspec.to_builtins(self._config),
            "versions": package_versions() | {"python": sys.version.split()[0]},
            "seed": self._config.seed,
            "service_times": msgspec.to_builtins(self._setup.service_times),
        }  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        session = self.session
        placements = session.plan.placements if session.plan is not None else {}
        return {
            "ranks": 1 if self._world is None else self._world.size,
            "launcher": self._launch.launcher,
            "staging": list(self._staged.facts),
            "mpi": None if self._world is None else self._world.library(),
            "fault_tolerant": self._world is not None and self._world.fault_tolerant,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_previous": os.environ.get(PREVIOUS) or None,
            "slurm_next": os.environ.get(NEXT) or None,
            "workers": [
                {
                    "rank": rank,
                    "host": session.hosts.get(rank, self._setup.host).hostname,
                    "device": placement.note,
                    "gpus": list(placement.gpu_uuids),
                    "threads": self._config.threads or placement.threads,
                    "fit": msgspec.to_builtins(placement.fit),
                }
                for rank, placement in sorted(placements.items())
            ],
        }

    def _requeue(self) -> None:
        """The last act, for Slurm ends the job that it puts back into its queue."""
        outcome = None if self.session.coordinator is None else self.session.coordinator.outcome
        job = self._keeper.job
        if job is None or outcome is None or outcome.outcome != "drained" or not self._keeper.requeues():
            return
        self._view.note(f"asking Slurm to requeue job {job}, which goes on with this run")
        if (problem := requeue(job)) is not None:
            self._view.warn(f"llmpi: Slurm does not requeue job {job}: {problem}")

    def _tell_resume(self, run: RunDir, found: Recovery) -> None:
        if found.torn_bytes:
            self._view.note(f"cut {found.torn_bytes} bytes of an unfinished line off the record")
        if found.lost_bytes:
            self._view.warn(
                f"llmpi: {run.record_path} lacks {found.lost_bytes:,} bytes of answers that had been counted: somebody "
                "cut them off, or the file system lost them. They are computed again"
            )
        if run.resumed:
            left = "" if run.total is None else f", {run.total - found.done} to go"
            self._view.note(f"resuming {run.path}: {counted(found.done, 'request')} already done{left}")

    def _keep_on(self) -> bool:
        """Until a second signal. Open MPI gives a rank 0.2 s after SIGTERM: what there is to say is said at once."""
        signals = self._signals
        if signals.count and not self._said_stopping:
            self._said_stopping = True
            if self._killed_soon():
                self._view.warn("stopping: what is recorded is safe, and the same command resumes the run")
        return signals.count < 2

    def _killed_soon(self) -> bool:
        return self._signals.name == "SIGTERM" and self._launch.launcher == "openmpi"

    def _callbacks(self, run: RunDir, found: Recovery) -> Callbacks:
        def stops() -> list[ev.DrainRequested | ev.TimeLimited]:
            events = self._keeper.stops(run.stop_requested, size_of(found, self.session.coordinator))
            for event in events:
                self._tell_stop(event)
            return events

        def on_tick(snapshot: Snapshot) -> None:
            self._view.show(snapshot)
            self._intervals.tick()

        return Callbacks(on_counters=self._intervals.hear, on_tick=on_tick, on_note=self._view.warn, stops=stops)

    def _tell_stop(self, event: ev.DrainRequested | ev.TimeLimited) -> None:
        if isinstance(event, ev.TimeLimited):
            if not self._said_limit:
                self._said_limit = True
                self._view.note(f"{event.reason}: before that, nothing is started that would not end in time")
        elif not self._killed_soon():
            bound_s = self._options.stopping.drain_timeout_s
            self._view.warn(
                f"draining ({event.reason}): what runs may finish, and within {bound_s:g} s this job ends and the run "
                "can be resumed; once more stops at once"
            )

    def _copies(self) -> Rows:
        coordinator = self.session.coordinator
        assert coordinator is not None
        return copy_rows(coordinator, self.session.number, self.session.welcomed_at)

    def _filled(self, ranks: Rows) -> Rows:
        """Rows of the rank table with what only rank 0 knows."""
        coordinator = self.session.coordinator
        return ranks if coordinator is None else rank_rows(ranks, coordinator)
