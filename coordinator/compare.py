"""What differs between two runs: what was asked for, with what, on which machines, and what was answered.

Answers are paired by custom_id and are equal if every choice has the same text and ended the same way (embeddings: the
same numbers; failures: the same code). Both records are read once; of the earlier one 16 bytes a request are kept, so
memory does not grow with the answers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from coordinator.ids import hash_id
from coordinator.terminal import console_for
from scheduling.recordline import decode_row
from storage.answers import Answer, decode_answer
from storage.recovery import RECORD_NAME, record_lines
from storage.runjson import read_run

ANSWERS_SHOWN = 5
CHANGES_SHOWN = 12
CHARACTERS_SHOWN = 60

_OF_ALL_RANKS = ("ranks", "launcher", "mpi")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as before; None: it was not there."""

    what: str
    before: Any
    after: Any


@dataclass(slots=True)
class Answers:
    """How many answers are equal, by custom_id. `shown`: the first that differ, with text from just before there."""

    equal: int = 0
    different: int = 0
    missing: int = 0
    added: int = 0
    shown: list[Change] = field(default_factory=list)
    missing_shown: list[str] = field(default_factory=list)
    added_shown: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare_runs` found."""

    before: Path
    configuration: list[Change]
    versions: list[Change]
    machines: list[Change]
    answers: Answers

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"before": str(self.before)}

    def print(self, stream: IO[str]) -> None:
        """For people: a line each."""
        console = console_for(stream)
        say = _Teller(lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False))
        say(f"\ncompared with {self.before}")
        say.changes("configuration", self.configuration)
        say.changes("versions", self.versions)
        say.changes("machines", self.machines)
        found = self.answers
        say(
            f"  answers: {found.equal:,} equal, {found.different:,} different, {found.missing:,} missing, "
            f"{found.added:,} that were not there before"
        )
        for one in found.shown:
            say(f"    {one.what}: {one.before!r} before, {one.after!r} now")
        for word, names, count in (
            ("missing", found.missing_shown, found.missing), ("new", found.added_shown, found.added),
        ):  # fmt: skip
            if names:
                say(f"    {word}: {', '.join(names)}{', …' if count > len(names) else ''}")


class _Teller:
    def __init__(self, say: Any) -> None:
        self._say = say

    def __call__(self, text: str) -> None:
        self._say(text)

    def changes(self, name: str, changes: list[Change]) -> None:
        if not changes:
            self(f"  {name}: the same")
            return
        self(f"  {name}: {len(changes)} different")
        for one in changes[:CHANGES_SHOWN]:
            self(f"    {one.what}: {_short(one.before)} before, {_short(one.after)} now")
        if len(changes) > CHANGES_SHOWN:
            self(f"    and {len(changes) - CHANGES_SHOWN} more: see run.json of both")


def compare_runs(before: Path, after: Path) -> Comparison:
    """Raises RunDirError if one of them is no run directory, or its record is damaged."""
    old, new = read_run(before), read_run(after)
    return Comparison(
        before=before,
        configuration=_changes(_configuration(old), _configuration(new)),
        versions=_changes(old["details"].get("versions") or {}, new["details"].get("versions") or {}),
        machines=_machine_changes(old, new),
        answers=compare_answers(before / RECORD_NAME, after / RECORD_NAME),
    )


# ---------------------------------------------------------------- what run.json says


def _configuration(state: Mapping[str, Any]) -> dict[str, Any]:
    details, identity = state["details"], state["identity"]
    given = dict(identity.get("input") or {})
    config = dict(details.get("config") or {})
    config.pop("model", None)  # a path; what it led to is below
    return {
        "config": config,
        "model": {"path": details.get("model"), "fingerprint": identity.get("model")},
        "adapters": identity.get("adapters"),
        "input": {key: given.get(key) for key in ("bytes", "ends_sha256", "format")},
        "requests": state.get("total"),
    }


def _machine_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What is true of the whole comes first, and a rank that only one run had is one change: a long list is cut."""
    old, new = _last_session(before), _last_session(after)
    found = [Change(name, old.get(name), new.get(name)) for name in _OF_ALL_RANKS if old.get(name) != new.get(name)]
    had, has = ({one["rank"]: one for one in session.get("workers") or ()} for session in (old, new))
    for rank in sorted(had.keys() | has.keys()):
        name = f"rank {rank}"
        if rank in had and rank in has:
            found += _changes({name: _settled(had[rank])}, {name: _settled(has[rank])})
        else:
            found.append(Change(name, _place(had.get(rank)), _place(has.get(rank))))
    return found


def _last_session(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last one that had workers."""
    return next((session for session in reversed(state["sessions"]) if session.get("workers")), {})


def _place(worker: Mapping[str, Any] | None) -> str | None:
    return None if worker is None else f"{worker.get('host')}, {worker.get('device')}"


def _settled(worker: Mapping[str, Any]) -> dict[str, Any]:
    """A worker without the sentence on what fits: that tells how much memory was free, which is never the same, and
    what came of it stands beside it."""
    plain = {name: value for name, value in worker.items() if name != "rank"}
    fit = plain.get("fit")
    return plain | ({"fit": {name: value for name, value in fit.items() if name != "said"}} if fit else {})


def _changes(before: Any, after: Any) -> list[Change]:
    old, new = dict(_leaves("", before)), dict(_leaves("", after))
    return [Change(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= CHARACTERS_SHOWN else text[: CHARACTERS_SHOWN - 1] + "…"


# ---------------------------------------------------------------- what the records say


def compare_answers(before: Path, after: Path) -> Answers:
    """Compare two records. Raises RunDirError for one that is damaged; one that is not there is empty."""
    found = Answers()
    index = _Index(before)
    with open(before, "rb") if before.exists() else open("/dev/null", "rb") as old:
        for _, line in record_lines(after) if after.exists() else ():
            answer = decode_answer(line)
            earlier = index.take(old, answer.custom_id)
            if earlier is None:
                found.added += 1
                if len(found.added_shown) < ANSWERS_SHOWN:
                    found.added_shown.append(answer.custom_id)
            elif _meaning(earlier) == _meaning(answer):
                found.equal += 1
            else:
                found.different += 1
                if len(found.shown) < ANSWERS_SHOWN:
                    found.shown.append(Change(answer.custom_id, *_excerpts(_words(earlier), _words(answer))))
        for offset in index.left():
            found.missing += 1
            if len(found.missing_shown) < ANSWERS_SHOWN:
                old.seek(offset)
                found.missing_shown.append(decode_row(old.readline()).custom_id)
    return found


class _Index:
    """Where the line of each custom_id begins in a record: 16 bytes a request."""

    def __init__(self, path: Path) -> None:
        hashes, offsets = bytearray(), array("q")
        if path.exists():
            for offset, line in record_lines(path):
                hashes += hash_id(decode_row(line).custom_id)
                offsets.append(offset)
        values, places = np.frombuffer(hashes, "<u8"), np.frombuffer(offsets, np.int64)
        order = np.argsort(values, kind="stable")
        self._hashes, self._offsets = values[order], places[order]
        self._taken = np.zeros(len(order), np.bool_)

    def take(self, file: BinaryIO, custom_id: str) -> Answer | None:
        """The answer of that name, if there is one that was not taken before."""
        value = np.uint64(int.from_bytes(hash_id(custom_id), "little"))
        place = int(np.searchsorted(self._hashes, value))
        while place < len(self._hashes) and self._hashes[place] == value:
            if not self._taken[place]:
                file.seek(int(self._offsets[place]))
                answer = decode_answer(file.readline())
                if answer.custom_id == custom_id:
                    self._taken[place] = True
                    return answer
            place += 1
        return None

    def left(self) -> Iterator[int]:
        """Offsets of those that were not taken, in the order of the record."""
        yield from np.sort(self._offsets[~self._taken]).tolist()


def _meaning(answer: Answer) -> Any:
    """What must be the same for two answers to be equal."""
    if answer.error is not None:
        return answer.error.code
    texts = [(choice.index, choice.said, choice.finish_reason, choice.logprob) for choice in answer.choices]
    return texts, [(vector.index, vector.embedding) for vector in answer.vectors]


def _words(answer: Answer) -> str:
    if answer.error is not None:
        return f"failed: {answer.error.code}"
    if answer.vectors:
        return str(answer.vectors[0].embedding)
    return "\n".join([f"{choice.said} [{choice.finish_reason}]" for choice in answer.choices])


def _excerpts(before: str, after: str) -> tuple[str, str]:
    """Of two texts what stands where they part, with a little before it."""
    same = next(
        (k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - CHARACTERS_SHOWN // 3)
    begin = "…" if start else ""
    return (
        begin + before[start : start + CHARACTERS_SHOWN],
        begin + after[start : start + CHARACTERS_SHOWN],
    )
