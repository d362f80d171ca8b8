"""`llmpi batch`: the main job, from a file of requests to a complete run directory. What every rank runs.

Rank 0 leads (`coordinator.lead`), the other ranks serve.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator import watch
from coordinator.batchoptions import BatchOptions
from coordinator.compressed import STDIN, stdin_for_ranks
from coordinator.config import JobConfig
from coordinator.hostfile import count_slots, without_hostfile
from coordinator.launch import Launch, detect
from coordinator.ownmpirun import find_mpirun, flavour_of, own_mpirun, run_own_mpirun, unstarted
from coordinator.ranks import open_world, serve_rank
from coordinator.replay import read_recorded
from coordinator.setup import prepare
from coordinator.signals import StopSignals, ignore_stop_signals
from coordinator.staging import stage_models
from coordinator.statusline import state_line
from coordinator.timekeeper import Timekeeper, age_s
from coordinator.timelimit import requeue
from scheduling.errors import (
    EXIT_INFRASTRUCTURE,
    EXIT_OK,
    EXIT_USAGE,
    ConfigError,
    LlmpiError,
    RunDirError,
    StoppedError,
)
from storage.runjson import RUN_NAME
from storage.runstatus import status as run_status


def run_batch(config: JobConfig, options: BatchOptions, argv: list[str]) -> int:
    """Run the job on this rank and return its exit code (see `scheduling.errors`)."""
    launch = detect(os.environ)
    options.stopping.check(os.environ)
    if launch.launcher != "none" and options.ranks not in (None, launch.size_claimed):
        raise ConfigError(
            f"--ranks is for when llmpi starts its own mpirun; this job was started by {launch.launcher} with "
            f"{launch.size_claimed} ranks: leave it out"
        )
    if launch.launcher != "none" and options.hostfile is not None:
        raise ConfigError(
            f"--hostfile is for when llmpi starts its own mpirun; this job was started by {launch.launcher}: give "
            "the file to that"
        )
    if launch.launcher == "none":
        room = None if options.hostfile is None else count_slots(options.hostfile, flavour_of(find_mpirun(os.environ)))
        ranks = options.ranks or room or ranks_for_devices(config)
        if room is not None and ranks > room:
            raise ConfigError(f"--ranks {ranks}, but {options.hostfile} has room for {room}")
        if options.ranks is None and room is None and ranks > 1 and config.coordinator_works is None:
            argv = [*argv, "--coordinator-works"]  # one rank a device, so rank 0 takes one too
        if options.ranks is not None and "--ranks" not in argv:
            argv = [*argv, "--ranks", str(options.ranks)]  # a replay's, which its ranks record in turn
        if ranks > 1:
            environ = {**os.environ, **(stdin_for_ranks() if options.input == STDIN else {})}
            command = own_mpirun(without_hostfile(argv), ranks, os.environ, hostfile=options.hostfile)
            return settled(run_own_mpirun(command, environ, resumable=str(options.output)), options.output)
    with StopSignals() as signals:  # before MPI starts: a signal that is not listened to ends the rank
        return _run_rank(config, options, launch, signals)


def _run_rank(config: JobConfig, options: BatchOptions, launch: Launch, signals: StopSignals) -> int:
    world = None if launch.launcher == "none" else open_world(launch, fanout=config.fanout, start_s=watch.START_S)
    if world is not None and world.rank > 0:
        ignore_stop_signals()
        with contextlib.suppress(LlmpiError):  # rank 0 tells why, once
            staged = stage_models(config, world)
            serve_rank(prepare(config, staged), world, options.output / "logs")
        return EXIT_OK
    from coordinator.lead import Lead  # what these load no other rank needs
    from coordinator.session import CLOSE_S

    keeper = Timekeeper(options.stopping, signals, age_s=age_s())
    if world is not None:
        world.goodbye_s = lambda: keeper.goodbye_s(config.lease_s + CLOSE_S)
    try:
        staged = stage_models(config, world, stopped=lambda: keeper.check("the model was staged"), quiet=options.quiet)
        return Lead(prepare(config, staged), options, launch, world, staged, signals, keeper=keeper).run()
    except StoppedError:
        if signals.name == "SIGUSR2" and keeper.job is not None and keeper.requeues():
            requeue(keeper.job)
        raise


def settled(status: int, run_dir: Path) -> int:
    """The exit code of a job that mpirun ended with `status`. That is not always the ranks' own: mpirun returns 0 when
    a host's daemon died, 1 when it was told to stop, 137 when a rank was killed. What the record says is true."""
    if not os.path.exists(run_dir / RUN_NAME):  # nor where that cannot be told, which the ranks have said
        return unstarted(status)
    if status in (EXIT_USAGE, EXIT_INFRASTRUCTURE):
        return status
    found = run_status(run_dir)
    if found.exit_code != status:
        print(f"mpirun ended with {status}; {state_line(found)}", file=sys.stderr)
    return found.exit_code


def replayed(
    run_dir: Path, fields: Mapping[str, Any], options: BatchOptions, names: frozenset[str]
) -> tuple[JobConfig, BatchOptions]:
    """The job that was run in `run_dir`, with what the options `names` say otherwise.

    `fields`: of a `JobConfig`, by the command line alone. They are checked together with the recorded ones.

    Raises RunDirError: there is no such run, or not enough is known of it. InputError: options that need an input.
    """
    if options.output.resolve() == run_dir.resolve():
        raise RunDirError(f"--replay and -o are both {run_dir}: give another run directory with -o")
    recorded = read_recorded(run_dir)
    expected = recorded.expected(names)
    changes: dict[str, Any] = {"replay": expected}
    if expected.input is not None:
        changes |= {"input": expected.input, "format": recorded.format, "part": recorded.part}
    if "ranks" not in names and detect(os.environ).launcher == "none":
        changes["ranks"] = recorded.ranks
    return recorded.job(fields, names), replace(options, **changes)


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
