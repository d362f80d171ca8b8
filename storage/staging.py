"""Bring models to every node of a job: read once, sent down a chain of nodes, checked on each before anyone opens it.

All ranks call `stage` together, before they open a model. Rank 0 knows the models and reads them. The first rank of
each node leads it: it finds a folder of the node and says what is there already. Nodes that have a model take no part.
The others form a chain behind rank 0 (`storage.relay`), hash what arrives, and give the copy its name if the digest is
that of the manifest, or what rank 0 has found where the model is in no store.

What one rank finds wrong is told to all in the next exchange, so that all end with the same words, and nobody waits.
Messages between ranks come by way of a `Group`: nothing here knows MPI.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from scheduling.errors import LlmpiError, ModelStoreError, StagingError, StoppedError
from storage.digest import Digest
from storage.filesystems import mount_of, read_mounts
from storage.relay import Channel, Relay, Relayed
from storage.stagedir import StageDir, Writing, candidates
from storage.stagemodel import Model, Reading, as_message, facts_of, of_message, told_as_line
from storage.stagesource import NoSource, SourceFiles

MODES = ("never", "auto", "always")
EXCHANGE_S = 60.0
"""How long the others may take to come to an exchange."""
SLOWEST_BYTES_PER_S = 5e6
"""A transfer slower than that is taken for one that never ends."""


class Group(Protocol):
    """All ranks of the job."""

    rank: int
    size: int

    def exchange(self, said: bytes, patience_s: float) -> list[bytes]:
        """What every rank says, in their order. Raises RankLostError if one says nothing in time."""

    def chain(self, ranks: Sequence[int]) -> Channel:
        """Of `ranks`, this one among them."""


@dataclass(frozen=True)
class Node:
    """Where this rank runs. `mounts`: its table of mounts, as it is by now (an automounter adds to it)."""

    host: str
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    mounts: Callable[[], str] = read_mounts
    free_memory_bytes: int = 1 << 62


@dataclass(frozen=True)
class StagedModel:
    """Where this rank finds a model: the copy on its node. `name`, `digest`, `source` as rank 0 knows them."""

    path: Path
    name: str
    digest: str | None
    source: str


@dataclass(frozen=True)
class Staged:
    """What came of it. `models`: by role, those that were staged. `notes`: for people. `facts`: for the record."""

    models: Mapping[str, StagedModel] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: tuple[dict[str, Any], ...] = ()


def stage(
    group: Group,
    mode: str,
    stage_dir: str | None,
    find: Callable[[], list[Model]],
    node: Node,
    *,
    stopped: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Staged:
    """Called by all ranks together. `find` is called on rank 0, and names the models of the job.

    Raises on all ranks alike:
        StagingError: a node has no room, or other bytes arrived than were sent or should have been; it is named.
        StoppedError: `stopped`, which rank 0 asks now and then, raised it.
        RankLostError: a rank does not answer. Only this is not told to all: end the job.
    """
    here = _exchange(group, {"host": node.host, "mode": mode, "stage_dir": stage_dir})
    if any((one["mode"], one["stage_dir"]) != (mode, stage_dir) for one in here) or mode == "never":
        return Staged()  # if they differ, the handshake refuses the job, and names who it is
    models = _plan(group, mode, find, node)
    if not models:
        return Staged()
    hosts = [one["host"] for one in here]
    work = _Work(group, mode, stage_dir, node, hosts, models)
    try:
        return work.run(stopped, progress)
    finally:
        work.close()


def _plan(group: Group, mode: str, find: Callable[[], list[Model]], node: Node) -> list[Model]:
    """Those models that are to be staged, on all ranks."""
    said: list[Any] = []
    if group.rank == 0:
        try:
            said = [as_message(model) for model in find() if mode == "always" or _is_remote(model, node)]
        except (LlmpiError, OSError):
            said = []  # whoever opens the model says what is wrong with it
    return [of_message(one) for one in _exchange(group, said)[0]]


def _is_remote(model: Model, node: Node) -> bool:
    return any(mount_of(Path(file.path), node.mounts()).network for file in model.files)


class _Work:
    """One call of `stage`, on one rank."""

    def __init__(
        self, group: Group, mode: str, stage_dir: str | None, node: Node, hosts: list[str], models: list[Model]
    ) -> None:
        self._group, self._mode, self._stage_dir, self._node = group, mode, stage_dir, node
        self._hosts, self._models = hosts, models
        self._leaders = [rank for rank, host in enumerate(hosts) if hosts.index(host) == rank]
        self._leads = group.rank in self._leaders
        self._dir: StageDir | None = None
        self._writing: Writing | None = None

    def close(self) -> None:
        if self._writing is not None:
            self._writing.drop()
            self._writing = None

    def run(self, stopped: Callable[[], None], progress: Callable[[int], None]) -> Staged:
        places = self._places()
        unable = [f"{self._hosts[rank]}: {place['problem']}" for rank, place in places.items() if place["problem"]]
        if unable:
            text = f"the model cannot be staged on {'; '.join(unable[:4])}"
            if self._mode == "always":
                raise StagingError(text)
            return Staged(notes=(f"{text}: it is read where it is",))
        staged, notes, facts = {}, [], []
        own = places[self._leaders[self._leader_of(self._group.rank)]]
        for number, model in enumerate(self._models):
            digests = self._digests(number, places)
            lacking = [rank for rank, place in places.items() if not place["direct"] and not place["has"][number]]
            began_s, read = time.monotonic(), Reading()
            if lacking:
                digests, read = self._send(model, digests, lacking, stopped, progress)
            path = Path(model.files[0].path) if own["direct"] else _copy(Path(own["folder"]), model, digests)
            staged[model.role] = StagedModel(path, model.name, model.digest, model.files[0].path)
            told = facts_of(model, places, len(lacking), time.monotonic() - began_s, read)
            facts.append(told)
            notes.append(told_as_line(told))
        return Staged(staged, tuple(notes), tuple(facts))

    def _leader_of(self, rank: int) -> int:
        return self._leaders.index(self._hosts.index(self._hosts[rank]))

    # ------------------------------------------------ what each node has

    def _places(self) -> dict[int, dict[str, Any]]:
        """Of each leader: its folder, which models it has, and what hinders it."""
        said: dict[str, Any] = {}
        if self._leads:
            try:
                said = self._look()
            except (LlmpiError, OSError) as error:
                said = _place(problem=str(error))
        heard = _exchange(self._group, said)
        return {rank: heard[rank] for rank in self._leaders}

    def _look(self) -> dict[str, Any]:
        """Find a folder of this node that has the models already, or has room for them."""
        problems = []
        for folder in candidates(self._stage_dir, self._node.environ):
            if mount_of(folder, self._node.mounts()).network and self._stage_dir is None:
                problems.append(f"{folder} is on a network file system")
                continue
            try:
                found = StageDir(folder)
                found.blobs.sweep()
            except LlmpiError as error:
                problems.append(str(error))
                continue
            if self._group.rank == 0 and self._lies_there(found):
                return _place(folder=str(folder), direct=True, has=[True] * len(self._models))
            digests = [self._known(found, model) for model in self._models]
            lacks = [found.lacks(model.files, known) for model, known in zip(self._models, digests, strict=True)]
            try:
                if sum(lacks):
                    found.need_writable()
            except StagingError as error:
                problems.append(str(error))
                continue
            room = found.room_bytes(self._node.mounts(), self._node.free_memory_bytes)
            if sum(lacks) and sum(lacks) > room:
                problems.append(
                    f"{folder} has room for {room / 1e9:,.1f} GB, and {sum(lacks) / 1e9:,.1f} GB are needed"
                )
                continue
            self._dir = found
            known = [[None if one is None else str(one) for one in row] for row in digests]
            return _place(folder=str(folder), has=[not count for count in lacks], known=known)
        return _place(problem="; ".join(problems) or "there is no folder for copies: name one with --stage-dir")

    def _lies_there(self, found: StageDir) -> bool:
        """Whether the models are on that very file system of rank 0's node: a copy would be of no use."""
        try:
            return all(os.stat(file.path).st_dev == found.device for model in self._models for file in model.files)
        except OSError:
            return False  # who reads it says why

    @staticmethod
    def _known(found: StageDir, model: Model) -> list[Digest | None]:
        told = [file.digest for file in model.files]
        if None not in told:
            return told
        noted = found.known(model.key)
        return list(noted) if len(noted) == len(model.files) else told

    def _digests(self, number: int, places: Mapping[int, dict[str, Any]]) -> Sequence[Digest | None]:
        """What the model's files should be: by its manifest, or by the note of a node that has them."""
        told = [file.digest for file in self._models[number].files]
        if None not in told:
            return told
        noted = {tuple(place["known"][number]) for place in places.values() if place["known"] and place["has"][number]}
        if len(noted) == 1:
            return [Digest.parse(text) for text in noted.pop()]
        if noted:  # nodes disagree: the file says who is right
            for place in places.values():
                place["has"][number] = place["direct"]
        return told

    # ------------------------------------------------ sending

    def _send(
        self, model: Model, digests: Sequence[Digest | None], lacking: Sequence[int], stopped: Callable[[], None],
        progress: Callable[[int], None],
    ) -> tuple[list[Digest], Reading]:  # fmt: skip
        """Bring `model` to the nodes of `lacking`. Returns its digests, and what rank 0 has read."""
        rank = self._group.rank
        chain = [0, *(one for one in lacking if one != 0)]
        said: dict[str, Any] = {"digests": [], "problem": "", "stopped": False, "read": [0, 0.0]}
        if rank in chain:
            relayed, count = self._relay(model, chain, rank in lacking, stopped, progress)
            said["digests"] = [str(one) for one in relayed.digests]
            said["problem"] = "" if relayed.problem is None else _words(relayed.problem)
            said["stopped"] = isinstance(relayed.problem, StoppedError)
            said["read"] = [count, relayed.read_s]
        # Rank 0 is in the chain, and the last to be through with it: from there on nobody has anything to wait for.
        sending_s = 0.0 if rank == 0 else model.size / SLOWEST_BYTES_PER_S
        heard = _exchange(self._group, said, EXCHANGE_S + sending_s)
        if heard[0]["stopped"]:
            raise StoppedError(heard[0]["problem"])
        problems = [self._named(one, heard[one]["problem"]) for one in chain if heard[one]["problem"]]
        right = heard[0]["digests"]
        if not problems and None not in digests and right != [str(one) for one in digests]:
            what = f"what is read from {model.files[0].path} is {', '.join(right)} and should be {_of(digests)}"
            problems.append(self._named(0, f"{what}: the file is damaged, `llmpi models verify` tells more"))
        elif not problems:
            problems += [
                self._named(one, f"other bytes arrived than rank 0 has read ({', '.join(heard[one]['digests'])}, not "
                            f"{', '.join(right)})")
                for one in chain if heard[one]["digests"] != right
            ]  # fmt: skip
        final = [Digest.parse(text) for text in right]
        # A node can have hashed all that arrived and not have written it.
        well = (
            bool(right)
            and not said["problem"]
            and said["digests"] == right
            and (None in digests or list(digests) == final)
        )
        self._finish(model, final, well and rank in lacking, problems)
        return final, Reading(*heard[0]["read"])

    def _finish(self, model: Model, final: list[Digest], keep: bool, problems: list[str]) -> None:
        """Name the copy here, if it is right, and end on all ranks alike. Raises StagingError."""
        own = ""
        try:
            if keep and self._writing is not None and self._dir is not None:
                self._writing.name(final)
                self._dir.note(model.key, final)
        except StagingError as error:
            own = str(error)
        finally:
            self.close()
        heard = _exchange(self._group, own)
        problems = problems + [self._named(rank, one) for rank, one in enumerate(heard) if one]
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise StagingError(f"{model.name} was not staged: {'; '.join(problems[:4])}{more}")

    def _relay(
        self, model: Model, chain: list[int], keeps: bool, stopped: Callable[[], None], progress: Callable[[int], None]
    ) -> tuple[Relayed, int]:
        """This node's part, and the bytes that were read here."""
        problem: Exception | None = None
        source: SourceFiles | None = None
        try:
            if self._group.rank == 0:
                source = SourceFiles(model.files)
            if keeps and self._dir is not None:
                on_disk = not mount_of(self._dir.root, self._node.mounts()).memory
                self._writing = Writing(self._dir, model.files, reserve=on_disk)
        except (StagingError, ModelStoreError) as error:
            problem = error
        first = self._group.rank == 0
        relay = Relay(
            self._group.chain(chain), [file.size for file in model.files],
            source=(source or NoSource()) if first else None, sink=self._writing, problem=problem,
            stopped=stopped, progress=progress if first else lambda _: None,
        )  # fmt: skip
        try:
            relayed = relay.run()
            if source is None:
                return relayed, 0
            if relayed.problem is None:
                try:
                    source.check_unchanged()
                except StagingError as error:
                    relayed = replace(relayed, digests=(), problem=error)  # nobody keeps it
            return relayed, source.bytes_read
        finally:
            if source is not None:
                source.close()

    def _named(self, rank: int, problem: str) -> str:
        return f"on {self._hosts[rank]} (rank {rank}): {problem}"


def _copy(folder: Path, model: Model, digests: Sequence[Digest | None]) -> Path:
    """Where a copy that is on this node is loaded from. If it has gone meanwhile, whoever opens it says so."""
    whole = [one for one in digests if one is not None]
    found = StageDir(folder)
    try:
        return found.path(model.files, whole)
    except ModelStoreError:
        return found.blobs.path(whole[0])


# ---------------------------------------------------------------- messages


def _exchange(group: Group, said: Any, patience_s: float = EXCHANGE_S) -> list[Any]:
    return [json.loads(one) for one in group.exchange(json.dumps(said).encode(), patience_s)]


def _place(
    *,
    folder: str = "",
    direct: bool = False,
    has: Sequence[bool] = (),
    known: Sequence[Sequence[str | None]] = (),
    problem: str = "",
) -> dict[str, Any]:
    """What a leader says of its node. `direct`: rank 0's, which loads the model from where it is."""
    return {"folder": folder, "direct": direct, "has": list(has), "known": list(known), "problem": problem}


def _of(digests: Sequence[Digest | None]) -> str:
    return ", ".join(str(one) for one in digests)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, LlmpiError) else f"{type(error).__name__}: {error}"
