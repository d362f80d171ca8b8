"""The end of a batch job on rank 0: metrics are gathered and checked, the run is marked, everyone is let go."""

from __future__ import annotations

import sys
from collections.abc import Callable

from coordinator.closing import ENGINE_S, GOODBYE_S, Closing, Size, closing_in, gather_s, metrics_s
from coordinator.intervals import Intervals
from coordinator.loop import Coordinator
from coordinator.replay import Replay
from coordinator.rundata import OwnRows, check_gathered, completed, make_metrics, workers_lost
from coordinator.session import Session
from coordinator.setup import Setup
from coordinator.simulated import WARNING
from coordinator.source import Source
from coordinator.timekeeper import Timekeeper
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_RESUMABLE, EXIT_SOME_FAILED, BugError
from storage.files import Disk
from storage.recovery import Recovery
from storage.rundir import RunDir

LINE_BYTES = 700
TOKEN_BYTES = 5
"""About, of a line of the record, and of each token of an answer in it."""


class Ending:
    """Of one job on one run directory. `show`: answers to print; `replay`: the run that this one is compared with."""

    def __init__(
        self, setup: Setup, session: Session, run: RunDir, disk: Disk, keeper: Timekeeper, clock: Callable[[], float],
        *, replay: Replay | None = None, show: int = 0, quiet: bool = False, as_json: bool = False,
        of_study: bool = False,
    ) -> None:  # fmt: skip
        self._config = setup.config
        self._session = session
        self._run = run
        self._disk = disk
        self._keeper = keeper
        self._clock = clock
        self._replay = replay
        self._show = show
        self._quiet = quiet
        self._as_json = as_json
        self._of_study = of_study

    def finish(
        self, coordinator: Coordinator, source: Source, found: Recovery, intervals: Intervals, fsyncs: int
    ) -> int:
        """After the loop, the record closed. Returns the exit code. `found`: what was done before this session.

        Whoever calls it lets go of the run directory, and leaves the session.
        """
        run, snapshot, outcome = self._run, coordinator.snapshot(), coordinator.outcome
        if outcome is None:
            intervals.close()
            self._session.let_go()
            self._session.close("stopped")
            self._say(f"stopped now; the same command resumes {run.path}")
            return EXIT_RESUMABLE
        if source.total is not None:
            run.set_total(source.total)
        own = OwnRows(coordinator)
        began, left_s = self._clock(), self._left_s(outcome.outcome)
        closing = self._closing(left_s, found, coordinator)
        size = size_of(found, coordinator)
        if closing.gather:
            gathered = self._session.collect(
                own, own.begin, None if left_s is None else left_s / 2,
                lambda: self._give_up_at(outcome.outcome, began), work_s=gather_s(size) + metrics_s(size),
            )  # fmt: skip
            closing = self._closing(
                self._left_s(outcome.outcome), found, coordinator
            )  # somebody may have said until when
        else:
            gathered = None
            self._session.let_go(metrics_s(size) if closing.metrics else 0.0)
        absent = self._session.absent(gathered) if closing.metrics else {}
        intervals.finish(gathered, lambda ranks: completed(ranks, absent, run, self._disk))
        doubt = ""
        if gathered is not None:
            try:
                check_gathered(run, gathered, own, coordinator, self._disk, absent)
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
            "unfinished": coordinator.plane.totals.unfinished, "set_aside": coordinator.plane.totals.set_aside,
            "collectives": self._session.took_part(gathered),
        }  # fmt: skip
        if lost := workers_lost(coordinator, self._session.names()):
            attributes["workers_lost"] = lost
        if doubt:
            attributes["sums_differ"] = doubt
        if (drain_s := self._keeper.drain_s) is not None:
            attributes["drain_s"] = round(drain_s, 3)
        run.add_session_facts({"outcome": outcome.outcome, "reason": outcome.reason, **attributes})
        if closing.metrics:
            make_metrics(run.path, self._disk)
        failed = found.failed + snapshot.failed
        ended = found.done + snapshot.done + snapshot.failed
        if outcome.outcome == "done" and ended != run.total:
            self._session.close("the input changed")
            self._say(f"llmpi: the input had {run.total} requests and gave {ended}: it was changed while the job ran")
            return EXIT_RESUMABLE
        if outcome.outcome == "done":
            run.mark_complete({"ok": found.ok + snapshot.done, "failed": failed})
        self._session.close(outcome.outcome)
        if closing.metrics:
            self._print(outcome.outcome)
        else:
            self._say(f"no time was left for metrics.h5 of {ended} answers: llmpi report {run.path} makes it")
        code = self._close(outcome.outcome, outcome.reason, failed, coordinator)
        if doubt:
            self._say(f"llmpi: an error of its own (please report it): {doubt}")
            code = EXIT_INFRASTRUCTURE
        return code

    def report(self, failed: int) -> int:
        """Of a run that was complete before: print the table. Returns the exit code."""
        self._print("done")
        return EXIT_SOME_FAILED if failed else EXIT_OK

    # ------------------------------------------------------------ time

    def _left_s(self, outcome: str) -> float | None:
        """How long there is until this process has to be gone; None: as long as it takes.

        A run that is done is made complete, whatever the time.
        """
        exit_by = self._keeper.exit_by
        return None if exit_by is None or outcome == "done" else max(0.0, exit_by - self._clock())

    def _give_up_at(self, outcome: str, began: float) -> float | None:
        """Until when ranks that do not answer are waited for. At least half of the time, however little it was."""
        exit_by = self._keeper.exit_by
        if exit_by is None or outcome == "done":
            return None
        return exit_by - min(GOODBYE_S, max(0.0, exit_by - began) / 2)

    def _closing(self, left_s: float | None, found: Recovery, coordinator: Coordinator) -> Closing:
        """What there is time for. Engines that stand in its way are killed, in half of the time for which their ranks
        are waited for: what these say afterwards is to arrive in it, too."""
        if left_s is None:
            return Closing(gather=True, metrics=True)
        self._session.engine_end_s = min(ENGINE_S, left_s / 8)
        return closing_in(left_s, size_of(found, coordinator))

    # ------------------------------------------------------------ what is said

    def _print(self, outcome: str) -> None:
        """The tables, and how the run compares with the one that it replays."""
        from coordinator.report import print_report, report_data

        run = self._run
        data = report_data(run.path)
        compared = None
        if self._replay is not None:
            from coordinator.compare import compare_runs

            compared = compare_runs(self._replay.run_dir, run.path)
        if self._as_json:
            from coordinator.values import print_json

            print_json(data if compared is None else data | {"replay": compared.as_data()})
        elif not self._quiet:
            print_report(data, sys.stdout, run.path, show=self._show)
        if compared is not None and not self._as_json:
            compared.print(sys.stdout)
        if self._config.engine == "simulated" and (self._as_json or self._quiet) and not self._of_study:
            self._say(WARNING)

    def _close(self, outcome: str, reason: str, failed: int, coordinator: Coordinator) -> int:
        """Say how it ended. Returns the exit code."""
        path = self._run.path
        if outcome == "drained":
            unfinished = coordinator.plane.totals.unfinished
            cut = f", {unfinished} that ran cut off" if unfinished else ""
            if not self._of_study:
                self._say(f"drained ({reason}){cut}; the same command resumes {path}")
            return EXIT_RESUMABLE
        if outcome == "no workers":
            self._say(f"llmpi: no worker is left: {reason}. The same command resumes {path}")
            return EXIT_INFRASTRUCTURE
        return EXIT_SOME_FAILED if failed else EXIT_OK

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr)


def load_ahead() -> None:
    """Load what only the end needs while engines load and requests run: at the end there may be seconds left, on a
    machine that has other work."""
    import coordinator.report  # noqa: F401


def size_of(found: Recovery, coordinator: Coordinator | None) -> Size:
    """About how large the record is by now."""
    if coordinator is None:
        return Size(found.done, found.durable_bytes)
    totals = coordinator.plane.totals
    rows = totals.done + totals.failed
    return Size(found.done + rows, found.durable_bytes + LINE_BYTES * rows + TOKEN_BYTES * totals.output_tokens)
