"""How a rank joins a job that a launcher started, and how one that is not rank 0 serves it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path

from coordinator.config import FANOUT
from coordinator.launch import Launch, check_singleton
from coordinator.leaving import at_last
from coordinator.mpi import World
from coordinator.relays import Branch
from coordinator.serve import serve
from coordinator.setup import Setup, build_worker
from coordinator.signals import ignore_stop_signals
from coordinator.watch import started_within
from scheduling.errors import EXIT_INFRASTRUCTURE, HandshakeError, RankLostError
from scheduling.link import Endpoint, Spoke


def open_world(
    launch: Launch, thread_level: str = "funneled", fanout: int = FANOUT, start_s: float | None = None
) -> World:
    """MPI, started, and to be ended by `leaving.leave`. `start_s`: for all ranks to come to its start; None: a program
    decides when they do.

    Raises ConfigError where the launcher's tasks do not see each other.
    """
    with contextlib.nullcontext() if start_s is None else started_within(start_s, launch.rank_claimed):
        world = World(thread_level, fanout)
    at_last(world.leave)
    check_singleton(launch, world.size, os.environ, world.library())
    return world


def serve_rank(setup: Setup, world: World, log_dir: Path | None) -> None:
    """Be a worker rank until rank 0 has no more use for it. What went wrong is rank 0's to tell.

    Raises:
        HandshakeError: rank 0 has refused the job, and says why.
    """
    ignore_stop_signals()
    where = f"rank {world.rank} on {setup.host.hostname}"
    log = None if log_dir is None else log_dir / f"engine-{world.rank}.log"
    try:
        endpoint: Endpoint = world.endpoint()
        branch = None
        if world.leaders:
            endpoint = branch = Branch(endpoint, world.rank, world.leaders, time.monotonic, setup.config.lease_s)
        worker = build_worker(setup, world.rank, Spoke(endpoint), log)
        serve(worker, world.collectives, time.monotonic, branch=branch)
        if worker.silence_max_s is not None:
            world.rank0_silence_max_s = worker.silence_max_s
    except HandshakeError:
        raise
    except RankLostError as error:
        print(f"llmpi: {where}: {error}: its engine has ended, and it leaves", file=sys.stderr)
        world.abort(EXIT_INFRASTRUCTURE)
    except Exception:
        print(f"llmpi: an error of its own in {where}, which leaves:\n{traceback.format_exc()}", file=sys.stderr)
        world.die(EXIT_INFRASTRUCTURE)  # the others may be waiting for this rank in a collective
