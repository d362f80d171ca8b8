"""`llmpi batch`: the main job, from a file of requests to a complete run directory.

Every rank runs `run_batch`. Rank 0 leads: it checks the input, opens the run directory, starts the session, drives the
loop, and brings everything to disk before anyone is let go. The other ranks serve. Whatever goes wrong on rank 0, the
others are released and what was acknowledged is safe.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from coordinator.collect import Rows
from coordinator.compressed import STDIN, STDIN_VARIABLE, stdin_for_ranks
from coordinator.config import JobConfig, package_versions
from coordinator.convert import source_of
from coordinator.inputfile import Format, ends_identity, only_embeddings, sniff_format
from coordinator.intervals import Intervals
from coordinator.launch import Launch, check_singleton, detect, find_mpirun, own_mpirun, run_own_mpirun
from coordinator.loop import Callbacks, Coordinator, Snapshot
from coordinator.mpi import Collectives, World
from coordinator.prepared import Prepared, prepare_input, tell_row
from coordinator.progress import ProgressView
from coordinator.replay import Replay, read_recorded
from coordinator.rows import Columns
from coordinator.rundata import NO_COLLECTIVES, OwnRows, check_gathered, make_metrics, rank_rows
from coordinator.serve import serve
from coordinator.session import Session
from coordinator.setup import Setup, build_worker, prepare
from coordinator.signals import StopSignals, ignore_stop_signals
from coordinator.simulated import WARNING
from coordinator.source import FileSource, same_input
from coordinator.staging import stage_models
from scheduling.errors import (
    EXIT_INFRASTRUCTURE,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_SOME_FAILED,
    BugError,
    ConfigError,
    HandshakeError,
    InputError,
    LlmpiError,
    RecordError,
    RunDirError,
    StoppedError,
)
from scheduling.link import Spoke
from storage.files import Disk, OsDisk
from storage.record import RecordWriter
from storage.recovery import Recovery, recover
from storage.rundir import RUN_NAME, RunDir, holds_answers, read_run
from storage.staging import Staged


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What concerns only rank 0, or how the job is shown."""

    input: Path
    output: Path
    format: str | None = None
    columns: Columns = field(default_factory=Columns)
    replay: Replay | None = None
    """What this run is to be the same as."""
    ranks: int | None = None
    show: int = 0
    quiet: bool = False
    as_json: bool = False


def run_batch(config: JobConfig, options: BatchOptions, argv: list[str]) -> int:
    """Run the job on this rank and return its exit code (see `scheduling.errors`)."""
    launch = detect(os.environ)
    if launch.launcher != "none" and options.ranks not in (None, launch.size_claimed):
        raise ConfigError(
            f"--ranks is for when llmpi starts its own mpirun; this job was started by {launch.launcher} with "
            f"{launch.size_claimed} ranks: leave it out"
        )
    if launch.launcher == "none":
        devices = ranks_for_devices(config)
        if options.ranks is None and devices > 1 and config.coordinator_works is None:
            argv = [*argv, "--coordinator-works"]  # one rank a device, so rank 0 takes one too
        if options.ranks is not None and "--ranks" not in argv:
            argv = [*argv, "--ranks", str(options.ranks)]  # a replay's, which its ranks record in turn
        if (ranks := options.ranks or devices) > 1:
            environ = {**os.environ, **(stdin_for_ranks() if options.input == STDIN else {})}
            command = own_mpirun(argv, ranks, os.environ)
            return run_own_mpirun(command, environ, resumable=str(options.output))
        world = None
    else:
        world = open_world(launch)
    if world is not None and world.rank > 0:
        ignore_stop_signals()
        with contextlib.suppress(LlmpiError):  # rank 0 tells why, once
            staged = stage_models(config, world)
            serve_rank(prepare(config, staged), world, options.output / "logs")
        return EXIT_OK
    with StopSignals() as signals:
        staged = stage_models(config, world, stopped=lambda: _stop_staging(signals), quiet=options.quiet)
        return _Lead(prepare(config, staged), options, launch, world, staged, signals).run()


def _stop_staging(signals: StopSignals) -> None:
    if signals.count:
        raise StoppedError(f"{signals.name} received while the model was staged: nothing was started")


def replayed(
    run_dir: Path, config: JobConfig, options: BatchOptions, names: frozenset[str]
) -> tuple[JobConfig, BatchOptions]:
    """The job that was run in `run_dir`, with what the options `names` say otherwise.

    Raises RunDirError: there is no such run, or not enough is known of it. InputError: options that need an input.
    """
    if options.output.resolve() == run_dir.resolve():
        raise RunDirError(f"--replay and -o are both {run_dir}: give another run directory with -o")
    recorded = read_recorded(run_dir)
    expected = recorded.expected(names)
    changes: dict[str, Any] = {"replay": expected}
    if expected.input is not None:
        changes |= {"input": expected.input, "format": recorded.format}
    if "ranks" not in names and detect(os.environ).launcher == "none":
        changes["ranks"] = recorded.ranks
    return recorded.job(config, names), replace(options, **changes)


def ranks_for_devices(config: JobConfig) -> int:
    """Ranks to start on this machine by ourselves: one a GPU, or 1 where one process is enough."""
    from workers.hosts import describe_host

    if config.want_gpu is False:
        return 1
    devices = len(describe_host(os.environ).gpus) // config.gpus_per_rank * config.ranks_per_gpu
    if devices <= 1:
        return 1
    try:
        find_mpirun(os.environ)
    except ConfigError:
        return 1  # one process hosts an engine for each device instead
    return devices


def open_world(launch: Launch, thread_level: str = "funneled") -> World:
    """MPI, started. Raises ConfigError where the launcher's tasks do not see each other."""
    world = World(thread_level)
    check_singleton(launch, world.size, os.environ, world.library())
    return world


def refuse_edited_input(output: Path, source: FileSource, disk: Disk) -> dict[str, Any]:
    """Refuse to resume where the input was changed in a way that its size and ends do not show.

    Returns what is known of the input's content, from earlier sessions too.

    Raises:
        RunDirError: the run was started with another content of the same input file.
    """
    if not disk.exists(output / RUN_NAME) or not holds_answers(output, disk):
        return dict(source.identity())
    before = read_run(output, disk)["details"].get("input_identity")
    if isinstance(before, dict) and not same_input(before, source.identity()):
        raise RunDirError(
            f"{output} was started with another content of the input: give another run directory, or restore the file"
        )
    return (before or {}) | source.identity()


def serve_rank(setup: Setup, world: World, log_dir: Path | None) -> None:
    """Be a worker rank until rank 0 has no more use for it. What went wrong is rank 0's to tell.

    Raises:
        HandshakeError: rank 0 has refused the job, and says why.
    """
    ignore_stop_signals()
    log = None if log_dir is None else log_dir / f"engine-{world.rank}.log"
    try:
        worker = build_worker(setup, world.rank, Spoke(world.endpoint()), log)
        serve(worker, lambda: Collectives(world), time.monotonic)
    except HandshakeError:
        raise
    except Exception:
        where = f"rank {world.rank} on {setup.host.hostname}"
        print(f"llmpi: an error of its own in {where}, ending the job:\n{traceback.format_exc()}", file=sys.stderr)
        world.abort(EXIT_INFRASTRUCTURE)  # the others may be waiting for this rank in a collective


class _Lead:
    """Rank 0 of one job."""

    def __init__(
        self, setup: Setup, options: BatchOptions, launch: Launch, world: World | None, staged: Staged,
        signals: StopSignals, disk: Disk | None = None,
    ) -> None:  # fmt: skip
        self._disk = disk or OsDisk()
        self._setup = setup
        self._staged = staged
        self._signals = signals
        self._config = setup.config
        self._options = options
        self._launch = launch
        self._world = world
        self._view = ProgressView(sys.stderr, quiet=options.quiet)
        self._session = Session(setup, world)
        self._said_stopping = False
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
                return self._run_in(run, source)
        except BaseException as error:
            self._view.close()
            self._session.refuse(str(error))
            self._session.close(str(error))
            self._session.leave(EXIT_INFRASTRUCTURE)
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
            check_stop=lambda: self._checking(0, 0),
            stdin_ends=self._launch.launcher != "openmpi" or STDIN_VARIABLE in os.environ,
        )  # fmt: skip

    def _open(self, form: Format) -> FileSource:
        try:
            return FileSource(
                self._given.path, format=form, defaults=self._config.sampling, precheck=self._config.precheck,
                on_progress=self._checking, max_tokens=self._config.max_tokens,
            )  # fmt: skip
        except InputError as error:
            raise tell_row(error, self._given) from None

    def _checking(self, done_bytes: int, total_bytes: int) -> None:
        """The first pass over the input goes on; a signal ends it, for nothing has been started yet."""
        if self._signals.count:
            raise StoppedError(f"{self._signals.name} received while the input was checked: nothing was started")

    def _run_in(self, run: RunDir, source: FileSource) -> int:
        for note in run.notes:
            self._view.note(note)
        disk = self._disk
        found = recover(disk, run.record_path)
        if source.total is not None:
            run.set_total(source.total)
        if run.complete and run.total is not None and found.done < run.total:
            self._view.note(f"{run.path} was complete, but its record lacks {run.total - found.done} answers: going on")
            run.reopen()
        if run.complete:
            self._view.note(f"{run.path} is complete already: {found.ok} answered, {found.failed} failed")
            self._session.close("complete")
            return self._report(run, "done", "", found.failed)
        self._tell_resume(run, found)
        source.skip(found.states > 0)
        self._session.number = run.session
        self._session.embeds_only = only_embeddings(self._given.path, source.format)
        self._session.log_dir = run.path / "logs"
        self._session.log_dir.mkdir(exist_ok=True)
        if source.lengths is not None:
            self._session.lengths = source.lengths.without(found.done)
        for note in self._session.start():
            self._view.note(note)
        run.add_session_facts(self._facts())
        self._intervals = Intervals(disk, run.segments_path, run.session, self._filled, time.monotonic)
        record = RecordWriter(
            disk, run.record_path, time.monotonic, self._config.commit_interval_s, self._config.commit_bytes
        )
        try:
            coordinator = self._session.begin(
                source, record, self._callbacks(run), earlier=found.done
            )  # fmt: skip
            self._session.run(self._keep_on)
        except BaseException:
            with contextlib.suppress(RecordError):  # said already, or less important than what is on its way
                record.close()
            self._intervals.close()
            raise
        record.close()
        return self._finish(run, coordinator, source, found, record.fsyncs)

    # ------------------------------------------------------------ what a run is

    def _identity(self, form: Format) -> dict[str, Any]:
        made_from = {} if self._given.source is None else {"source": self._given.source}
        return {
            "input": ends_identity(self._given.path, form) | made_from,
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
            },
            "replay_of": None if self._options.replay is None else str(self._options.replay.run_dir.resolve()),
            "model": self._setup.model.path,
            "model_digest": self._setup.model_digest,
            "config": msgspec.to_builtins(self._config),
            "versions": package_versions() | {"python": sys.version.split()[0]},
            "seed": self._config.seed,
            "service_times": msgspec.to_builtins(self._setup.service_times),
        }  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        session = self._session
        placements = session.plan.placements if session.plan is not None else {}
        return {
            "ranks": 1 if self._world is None else self._world.size,
            "launcher": self._launch.launcher,
            "staging": list(self._staged.facts),
            "mpi": None if self._world is None else self._world.library(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
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

    def _tell_resume(self, run: RunDir, found: Recovery) -> None:
        if found.torn_bytes:
            self._view.note(f"cut {found.torn_bytes} bytes of an unfinished line off the record")
        if run.resumed:
            left = "" if run.total is None else f", {run.total - found.done} to go"
            self._view.note(f"resuming {run.path}: {found.done} requests were already done{left}")

    def _keep_on(self) -> bool:
        """Until a second signal. Open MPI gives a rank 0.2 s after SIGTERM: what there is to say is said at once."""
        signals = self._signals
        if signals.count and not self._said_stopping:
            self._said_stopping = True
            if self._killed_soon():
                self._view.note("stopping: what is recorded is safe, and the same command resumes the run")
        return signals.count < 2

    def _killed_soon(self) -> bool:
        return self._signals.name == "SIGTERM" and self._launch.launcher == "openmpi"

    def _callbacks(self, run: RunDir) -> Callbacks:
        signals = self._signals

        def stop_requested() -> str | None:
            if signals.count:
                return f"{signals.name} received"
            return "asked by llmpi stop" if run.stop_requested() else None

        draining: list[str] = []

        def stop_once() -> str | None:
            reason = stop_requested() if not draining else None
            if reason:
                draining.append(reason)
                if self._killed_soon():
                    return reason
                self._view.note(
                    f"draining ({reason}): what runs is finished, then the run can be resumed; once more stops at once"
                )
            return reason

        def on_tick(snapshot: Snapshot) -> None:
            self._view.show(snapshot)
            self._intervals.tick()

        return Callbacks(
            on_counters=self._intervals.hear, on_tick=on_tick, on_note=self._view.note, stop_requested=stop_once
        )

    def _filled(self, ranks: Rows) -> Rows:
        """Rows of the rank table with what only rank 0 knows."""
        coordinator = self._session.coordinator
        return ranks if coordinator is None else rank_rows(ranks, coordinator)

    # ------------------------------------------------------------ the end

    def _finish(self, run: RunDir, coordinator: Coordinator, source: FileSource, found: Recovery, fsyncs: int) -> int:
        snapshot = coordinator.snapshot()
        self._view.close(snapshot)
        outcome = coordinator.outcome
        if outcome is None:
            self._intervals.close()
            self._session.close("stopped")
            self._say(f"stopped now; the same command resumes {run.path}")
            return EXIT_RESUMABLE
        if source.total is not None:
            run.set_total(source.total)
        own = OwnRows(coordinator)
        gathered = self._session.collect(own)
        self._intervals.finish(gathered)
        doubt = ""
        if gathered is not None:
            try:
                check_gathered(run, gathered, own, coordinator, self._disk)
            except BugError as error:
                # The answers are whole: the run is complete. Only what the ranks counted is not to be trusted.
                doubt = str(error)
        attributes = {
            "wall_s": snapshot.elapsed_s, "session": run.session, "schedule": self._config.schedule, "fsyncs": fsyncs,
            "engine": self._config.engine,
            "requests": snapshot.done + snapshot.failed, "earlier": found.done,
            "prompt_tokens": snapshot.prompt_tokens, "output_tokens": snapshot.output_tokens,
            "late_answers_dropped": coordinator.plane.totals.late, "recalls": coordinator.plane.totals.recalls,
            "stolen": coordinator.plane.totals.stolen, "retried": coordinator.plane.totals.retried,
            "copies": coordinator.plane.totals.copies, "copies_won": coordinator.plane.totals.copies_won,
            "wasted_tokens": coordinator.plane.totals.wasted_tokens,
            "collectives": NO_COLLECTIVES if gathered is None else f"{gathered.ranks_in} ranks",
        }  # fmt: skip
        if doubt:
            attributes["sums_differ"] = doubt
        run.add_session_facts({"outcome": outcome.outcome, "reason": outcome.reason, **attributes})
        make_metrics(run.path, self._disk)
        failed = found.failed + snapshot.failed
        ended = found.done + snapshot.done + snapshot.failed
        if outcome.outcome == "done" and ended != run.total:
            self._session.close("the input changed")
            self._say(f"llmpi: the input had {run.total} requests and gave {ended}: it was changed while the job ran")
            return self._session.leave(EXIT_RESUMABLE)
        if outcome.outcome == "done":
            run.mark_complete({"ok": found.ok + snapshot.done, "failed": failed})
        self._session.close(outcome.outcome)
        code = self._report(run, outcome.outcome, outcome.reason, failed)
        if doubt:
            self._say(f"llmpi: an error of its own (please report it): {doubt}")
            code = EXIT_INFRASTRUCTURE
        return self._session.leave(code)

    def _report(self, run: RunDir, outcome: str, reason: str, failed: int) -> int:
        from coordinator.report import print_report, report_data

        data = report_data(run.path)
        compared = None
        if self._options.replay is not None:
            from coordinator.compare import compare_runs

            compared = compare_runs(self._options.replay.run_dir, run.path)
        if self._options.as_json:
            from coordinator.values import print_json

            print_json(data if compared is None else data | {"replay": compared.as_data()})
        elif not self._options.quiet:
            print_report(data, sys.stdout, run.path, show=self._options.show)
        if compared is not None and not self._options.as_json:
            compared.print(sys.stdout)
        if self._config.engine == "simulated" and (self._options.as_json or self._options.quiet):
            self._say(WARNING)
        if outcome == "drained":
            self._say(f"drained ({reason}); the same command resumes {run.path}")
            return EXIT_RESUMABLE
        if outcome == "no workers":
            self._say(f"llmpi: no worker is left: {reason}. The same command resumes {run.path}")
            return EXIT_INFRASTRUCTURE
        return EXIT_SOME_FAILED if failed else EXIT_OK

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr)
