"""`llmpi study scaling`: what every rank runs. Rank 0 leads one cell after the other, the other ranks are its crew."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from coordinator import watch
from coordinator.batchoptions import BatchOptions
from coordinator.compressed import STDIN
from coordinator.config import JobConfig
from coordinator.inputfile import ends_identity, sniff_format
from coordinator.launch import Launch, detect
from coordinator.lead import Lead
from coordinator.mpi import World
from coordinator.ownmpirun import own_mpirun, run_own_mpirun, unstarted
from coordinator.ranks import open_world, serve_rank
from coordinator.session import CLOSE_S
from coordinator.setup import prepare
from coordinator.signals import StopSignals, ignore_stop_signals
from coordinator.staging import stage_models
from coordinator.study.cells import Outcome, run_cell
from coordinator.study.crew import Crew, answer_calls
from coordinator.study.design import Cell, Design, fill_hosts
from coordinator.study.directory import WARM_UP_NAME, StudyDir
from coordinator.study.results import Results
from coordinator.timekeeper import Timekeeper, age_s
from coordinator.versions import package_versions
from scheduling.errors import EXIT_OK, EXIT_RESUMABLE, ConfigError, LlmpiError
from scheduling.messages import Host
from scheduling.placement import Plan, plan
from storage.runjson import STUDY_NAME
from storage.staging import Staged


def run_scaling(config: JobConfig, design: Design, options: BatchOptions, argv: list[str]) -> int:
    """Run the study on this rank; `options.output` is its directory. Returns the exit code (`scheduling.errors`)."""
    launch = detect(os.environ)
    options.stopping.check(os.environ)
    if options.input == STDIN:
        raise ConfigError("-i -: each cell reads the input, and standard input can be read once: give a file")
    if launch.launcher == "none":
        command = own_mpirun(argv, 1 + design.most, os.environ)
        status = run_own_mpirun(command, dict(os.environ), resumable=str(options.output))
        return status if os.path.exists(options.output / STUDY_NAME) else unstarted(status)
    world = open_world(launch, fanout=config.fanout, start_s=watch.START_S)
    check_room(design, world.size)
    if world.rank > 0:
        ignore_stop_signals()
        with contextlib.suppress(LlmpiError):  # rank 0 tells why, once
            staged = stage_models(config, world)

            def join(part: World, log_dir: str) -> None:
                serve_rank(prepare(config, staged), part, Path(log_dir))

            answer_calls(world, prepare(config, staged).host, join)
        return EXIT_OK
    with StopSignals() as signals:
        keeper = Timekeeper(options.stopping, signals, age_s=age_s())
        world.goodbye_s = lambda: keeper.goodbye_s(config.lease_s + CLOSE_S)
        staged = stage_models(config, world, stopped=lambda: keeper.check("the model was staged"), quiet=options.quiet)
        crew = Crew(world)
        keeper.meanwhile = crew.beat
        try:
            return _Scaling(config, design, options, launch, world, crew, staged, signals, keeper).run()
        finally:
            crew.dismiss()


def check_room(design: Design, ranks: int) -> None:
    """Raises ConfigError if there are too few ranks."""
    if ranks == 1:
        raise ConfigError(
            f"a study needs rank 0 and worker ranks, and this job has one rank: start it with mpirun -n "
            f"{1 + design.most}, or leave mpirun out"
        )
    if design.most > ranks - 1:
        raise ConfigError(
            f"--workers {','.join(map(str, design.workers))} needs {design.most} worker ranks and rank 0, and this job "
            f"has {ranks} ranks: start it with mpirun -n {1 + design.most}, or ask for at most {ranks - 1} workers"
        )


@dataclass
class _Scaling:
    """Rank 0 of a study."""

    config: JobConfig
    design: Design
    options: BatchOptions
    launch: Launch
    world: World
    crew: Crew
    staged: Staged
    signals: StopSignals
    keeper: Timekeeper

    def run(self) -> int:
        setup = prepare(self.config, self.staged)
        if setup.problem is not None:
            raise setup.problem
        hosts = {0: setup.host, **self.crew.hosts(lambda: self.keeper.check("the ranks gathered"))}
        order = fill_hosts({rank: host.hostname for rank, host in hosts.items()})[: self.design.most]
        placed = self._placed(hosts, order)
        identity = self._identity(setup.fingerprint, setup.adapters)
        with StudyDir.open(self.options.output, identity, self._details(hosts, order)) as study:
            for note in (*study.notes, *placed.notes, *self._notes(study, order, hosts)):
                self._say(note)
            code = self._cells(study, order, placed)
            results = Results(study.state, self.design)
            if results.rows:
                results.write(study, self._say)
                results.print(sys.stdout, study.path, as_json=self.options.as_json, quiet=self.options.quiet)
            if code == EXIT_RESUMABLE:
                lack = len(study.lacking(self.design.cells()))
                self._warn(
                    f"stopped: {lack} of {len(self.design.cells())} cells lack; the same command goes on with them"
                )
            return results.exit_code() if code == EXIT_OK else code

    def _cells(self, study: StudyDir, order: list[int], placed: Plan) -> int:
        """Run what lacks. Returns EXIT_OK, or the code of the cell that ended the study."""
        cells = self.design.cells()
        lacking = study.lacking(cells)
        if len(lacking) < len(cells):
            self._say(f"going on with {study.path}: {len(cells) - len(lacking)} of {len(cells)} cells are measured")
        if lacking and self.design.warm_up:
            self._say(f"warm-up: {self.design.most} workers, not counted")
            outcome = self._cell(study, Cell(self.design.most, 0, -1), WARM_UP_NAME, order, placed)
            if outcome.measured is None:
                return outcome.code
        for cell in lacking:
            if self.keeper.interruption():
                return EXIT_RESUMABLE
            outcome = self._cell(study, cell, cell.name, order, placed)
            if outcome.measured is None:
                return outcome.code
            study.add(outcome.measured, outcome.facts or {})
            one = outcome.measured
            self._say(
                f"cell {cell.order + 1} of {len(cells)}: {cell.workers} {_workers(cell.workers)}, "
                f"repeat {cell.repeat}: "
                f"{one.wall_s:.2f} s, {one.output_tokens_per_s:,.0f} output tokens/s (loaded in {one.load_s:.1f} s)"
            )
        return EXIT_OK

    def _cell(self, study: StudyDir, cell: Cell, name: str, order: list[int], placed: Plan) -> Outcome:
        path = study.fresh_cell(name)
        options = replace(self.options, output=path, quiet=True, as_json=False, of_study=True)
        part = self.crew.call([0, *order[: cell.workers]], str(path / "logs"))
        start_unix_s = time.time()
        lead = Lead(
            prepare(self.config, self.staged), options, self.launch, part, self.staged, self.signals, keeper=self.keeper
        )
        mine = {rank: one for rank, one in placed.placements.items() if rank <= cell.workers}
        lead.session.given_plan = Plan(mine, coordinator_works=False, notes=())
        return run_cell(cell, lead, path, start_unix_s)

    def _placed(self, hosts: dict[int, Host], order: list[int]) -> Plan:
        """Who has what, for the largest cell: workers are numbered from 1 in the order in which cells take them."""
        there = {0: hosts[0]} | {place: hosts[rank] for place, rank in enumerate(order, 1)}
        return plan(
            there, rank0_works=False, gpus_per_rank=self.config.gpus_per_rank, ranks_per_gpu=self.config.ranks_per_gpu,
            want_gpu=self.config.want_gpu,
        )  # fmt: skip

    def _identity(self, fingerprint: str, adapters: tuple[str, ...]) -> dict[str, Any]:
        """What cells must have in common: all that they are run with."""
        path = self.options.input
        content: Any = ends_identity(path, sniff_format(path)) if path.is_file() else str(path)
        config = msgspec.to_builtins(self.config, str_keys=True)
        for name in ("model", "service_times", "stage", "stage_dir", "precheck"):
            config.pop(name)  # what is in them counts, or that they do not change times
        return {
            "design": self.design.identity(), "input": content, "format": self.options.format,
            "columns": asdict(self.options.columns), "model": fingerprint, "adapters": list(adapters),
            "config": config,
        }  # fmt: skip

    def _details(self, hosts: dict[int, Host], order: list[int]) -> dict[str, Any]:
        return {
            "order": [cell.name for cell in self.design.cells()],
            "command": sys.argv, "cwd": str(Path.cwd()), "model": self.config.model, "input": str(self.options.input),
            "launcher": self.launch.launcher, "mpi": self.world.library(), "ranks": self.world.size,
            "workers": [
                {"worker": place, "rank": rank, "host": hosts[rank].hostname} for place, rank in enumerate(order, 1)
            ],
            "rank0_host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "versions": package_versions(),
        }  # fmt: skip

    def _notes(self, study: StudyDir, order: list[int], hosts: dict[int, Host]) -> list[str]:
        notes = []
        names = list(dict.fromkeys(hosts[rank].hostname for rank in order))
        if len(names) > 1:
            notes.append(f"cells take workers host by host: {', '.join(names)}")
        if (unused := self.world.size - 1 - len(order)) > 0:
            notes.append(f"{unused} {_workers(unused)} more than --workers asks for: never used")
        if self.design.base != 1:
            notes.append(
                f"speed-up is against {self.design.base} workers, the fewest of --workers: add 1 to have it against one"
            )
        before = {host for cell in study.state["cells"] for host in cell.get("hosts", ())}
        if before and not before & set(names):
            notes.append(f"the cells so far were measured on other hosts ({', '.join(sorted(before))})")
        return notes

    def _say(self, text: str) -> None:
        if not self.options.quiet:
            self._warn(text)

    @staticmethod
    def _warn(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _workers(count: int) -> str:
    return "worker" if count == 1 else "workers"
