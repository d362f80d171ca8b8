"""Mistakes planted in the product, each of which the simulation must find.

A bug replaces a function of the product by one with a single mistake in it, from outside and for as long as a context
lasts; the product has no hooks for this. `BUGS` has them by name.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from coordinator import lead
from coordinator.farewell import Farewell
from coordinator.relays import Branch, Bundle, Parcel, Way
from coordinator.rundata import OwnRows
from coordinator.session import Session
from coordinator.source import FileSource
from coordinator.timekeeper import Timekeeper
from scheduling import messages as m
from scheduling.control import ControlPlane
from scheduling.dispatch import Dispatcher
from scheduling.errors import RecordError
from scheduling.ledger import Ledger, RequestEntry, WorkerEntry
from scheduling.link import Link, Spoke
from storage import files, recovery, rundir
from storage.files import Disk
from storage.record import Batch, GroupCommit, RecordWriter
from storage.recovery import Recovery
from storage.summary import sums_of
from workers import worker as worker_module
from workers.worker import Worker

BUGS: dict[str, Callable[[], list[Any]]] = {}
"""By name: what makes the patches."""

FIRST_SEEDS = {"a leader vouches for its members": 2_180}
"""Where to look for what shows in few seeds: a member has to vanish with work while its leader lives."""

Patch = Any


def bug(make: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
    BUGS[make.__name__.replace("_", " ")] = make
    return make


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """While in force the product has the bug of this name."""
    with contextlib.ExitStack() as patches:
        for patch in BUGS[name]():
            patches.enter_context(patch)
        yield


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Patch:
    """A method replaced by `around(original, self, *arguments)`."""
    original = getattr(owner, name)

    def replaced(self: Any, *arguments: Any, **options: Any) -> Any:
        return around(original, self, *arguments, **options)

    return mock.patch.object(owner, name, replaced)


def unsent(kind: type[Any]) -> Patch:
    """A worker never sends messages of this kind."""

    def send(original: Any, spoke: Spoke, message: Any) -> None:
        if not isinstance(message, kind):
            original(spoke, message)

    return wrapped(Spoke, "send", send)


# ---------------------------------------------------------------- workers


@bug
def a_steals_confirmation_is_lost() -> list[Patch]:
    return [unsent(m.Recalled)]


@bug
def the_death_of_an_engine_is_not_told() -> list[Patch]:
    return [unsent(m.EngineDown)]


@bug
def a_heartbeat_is_never_sent() -> list[Patch]:
    return [mock.patch.object(worker_module, "heartbeat_s", return_value=float("inf"))]


@bug
def a_worker_forgets_what_ran_when_its_engine_dies() -> list[Patch]:
    def down(original: Any, worker: Worker, *arguments: Any, **options: Any) -> None:
        worker._held.clear()
        original(worker, *arguments, **options)

    return [wrapped(Worker, "_engine_down", down)]


# ---------------------------------------------------------------- between ranks


def twice(link: Link[Any, Any], payload: bytes) -> list[Any]:
    """The messages of an envelope, although it may have been here before."""
    envelope = link._decoder.decode(payload)
    link._received = max(link._received, envelope.number)
    messages: list[Any] = envelope.messages
    return messages


@bug
def a_duplicate_envelope_is_taken_twice() -> list[Patch]:
    return [wrapped(Link, "open", lambda original, link, payload: twice(link, payload))]


@bug
def nobody_is_told_to_leave() -> list[Patch]:
    def close(original: Any, session: Session, reason: str = "done") -> None:
        for worker in session.hosted:
            worker.close()

    return [wrapped(Session, "close", close)]


# ---------------------------------------------------------------- MPI's end


@bug
def the_dead_are_taken_along_into_mpis_end() -> list[Patch]:
    def dismiss(original: Any, farewell: Farewell) -> bool:
        farewell.dead.clear()
        return bool(original(farewell))

    return [wrapped(Farewell, "dismiss", dismiss)]


@bug
def nobodys_goodbye_is_waited_for() -> list[Patch]:
    return [wrapped(Farewell, "hear", lambda original, farewell, *arguments: [])]


@bug
def a_goodbye_is_waited_for_for_ever() -> list[Patch]:
    def hear(original: Any, farewell: Farewell, patience_s: float, lost: Any) -> Any:
        return original(farewell, float("inf"), lost)

    return [wrapped(Farewell, "hear", hear)]


# ---------------------------------------------------------------- leaders


@bug
def what_a_lost_leader_had_is_not_sent_again() -> list[Patch]:
    def go_alone(original: Any, branch: Branch, now: float) -> None:
        branch._way._kept.clear()
        original(branch, now)

    return [wrapped(Branch, "_go_alone", go_alone)]


@bug
def a_leader_vouches_for_its_members() -> list[Patch]:
    def send(original: Any, branch: Branch, now: float) -> None:
        for member in branch._members:
            branch._up.heard.setdefault(member, 0)
        original(branch, now)

    return [wrapped(Branch, "_send", send)]


@bug
def what_is_sent_again_is_taken_again() -> list[Patch]:
    """By links, too, which would recognise it."""
    again: set[tuple[int, int]] = set()
    payloads: set[bytes] = set()

    def send_again(original: Any, way: Way) -> list[Parcel]:
        parcels: list[Parcel] = original(way)
        again.update((parcel.worker, parcel.number) for parcel in parcels)
        payloads.update(parcel.payload for parcel in parcels)
        return parcels

    def take(original: Any, way: Way, parcel: Parcel) -> bool:
        return original(way, parcel) or (parcel.worker, parcel.number) in again

    def opened(original: Any, link: Link[Any, Any], payload: bytes) -> list[Any]:
        messages: list[Any] = twice(link, payload) if payload in payloads else original(link, payload)
        return messages

    return [wrapped(Way, "again", send_again), wrapped(Way, "take", take), wrapped(Link, "open", opened)]


@bug
def a_leader_loses_a_bundle() -> list[Patch]:
    carried = itertools.count(1)

    def carry_up(original: Any, branch: Branch, bundle: Bundle, now: float) -> None:
        if not bundle.parcels or next(carried) % 50:
            original(branch, bundle, now)

    return [wrapped(Branch, "_carry_up", carry_up)]


# ---------------------------------------------------------------- the control plane


@bug
def answers_are_taken_of_whatever_attempt() -> list[Patch]:
    def owned(_: Any, ledger: Ledger, worker: WorkerEntry, index: int, attempt: int) -> RequestEntry | None:
        request = ledger.live.get(index)
        return request if request is not None and request.owner is not None else None

    return [wrapped(Ledger, "owned", owned)]


@bug
def a_lease_never_expires() -> list[Patch]:
    return [wrapped(ControlPlane, "_tick", lambda original, plane, now, out: None)]


@bug
def a_drain_is_forgotten() -> list[Patch]:
    return [wrapped(Timekeeper, "stops", lambda original, keeper, asked, size: [])]


@bug
def what_a_lost_worker_had_is_lost() -> list[Patch]:
    def lost(original: Any, plane: ControlPlane, worker: WorkerEntry, reason: str, out: list[Any]) -> None:
        with mock.patch.object(plane, "_requeue"):
            original(plane, worker, reason, out)

    return [wrapped(ControlPlane, "_worker_lost", lost)]


@bug
def recalls_of_a_lost_victim_stay_open() -> list[Patch]:
    def withdraw(original: Any, dispatcher: Dispatcher, worker: WorkerEntry) -> None:
        dispatcher._hungry.pop(worker.id, None)

    return [wrapped(Dispatcher, "_withdraw", withdraw)]


# ---------------------------------------------------------------- the record and the run directory


@bug
def answers_are_acknowledged_before_they_are_synced() -> list[Patch]:
    def write(original: Any, core: GroupCommit, batch: Batch) -> int:
        core.durable_lines += len(batch.lines)
        try:
            written: int = original(core, batch)
        finally:
            core.durable_lines -= len(batch.lines) if core.failure is None else 0
        return written

    return [wrapped(GroupCommit, "write", write)]


@bug
def a_failure_of_the_disk_is_taken_for_success() -> list[Patch]:
    def write(original: Any, core: GroupCommit, batch: Batch) -> int:
        try:
            written: int = original(core, batch)
        except RecordError:
            core.failure = None
            core.durable_lines += len(batch.lines)
            written = len(batch.lines)
        return written

    return [wrapped(GroupCommit, "write", write)]


@bug
def nothing_is_synced() -> list[Patch]:
    def write(original: Any, core: GroupCommit, batch: Batch) -> int:
        with mock.patch.object(type(core._file), "sync"):
            written: int = original(core, batch)
        return written

    return [wrapped(GroupCommit, "write", write)]


@bug
def a_torn_tail_is_not_cut() -> list[Patch]:
    def recover(disk: Disk, path: Path) -> Recovery:
        return recovery.scan(disk, path)

    return [mock.patch.object(lead, "recover", recover)]


@bug
def a_resume_does_not_skip_what_is_done() -> list[Patch]:
    return [wrapped(FileSource, "skip", lambda original, source, done: None)]


@bug
def run_json_is_renamed_before_it_is_synced() -> list[Patch]:
    def replace(disk: Disk, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        file = disk.open_append(temporary)
        try:
            file.truncate(0)
            file.write(data)
        finally:
            file.close()
        disk.rename(temporary, path)
        disk.sync_dir(path.parent)

    return [mock.patch.object(module, "replace_file", replace) for module in (files, rundir)]


@bug
def the_last_of_several_lines_is_never_written() -> list[Patch]:
    def append(original: Any, writer: RecordWriter, lines: Sequence[bytes]) -> None:
        original(writer, lines[:-1] if len(lines) > 1 else lines)

    return [wrapped(RecordWriter, "append", append)]


# ---------------------------------------------------------------- metrics


@bug
def late_answers_are_counted_too() -> list[Patch]:
    def call(original: Any, own: OwnRows, rows: Any) -> None:
        own.sums += sums_of(rows)

    return [wrapped(OwnRows, "__call__", call)]
