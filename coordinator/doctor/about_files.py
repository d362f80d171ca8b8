"""The folders that a job reads and writes: model store, staging place, run directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from coordinator.doctor.facts import ModelFile, Node, Place
from coordinator.doctor.findings import Finding, error, listed, merged, ok, size_text, time_text, warning

RUN_DIR, STORE, STAGING = "run directory", "model store", "staging place"
FREE_BYTES_MIN = {RUN_DIR: 1 << 30, STORE: 4 << 30, STAGING: 4 << 30}
"""With less free, people are told."""
SLOW_FSYNC_S = 0.25
SLOW_WRITE_BYTES_PER_S = 10e6
SLOW_READ_BYTES_PER_S = 50e6


def about_files(nodes: Mapping[str, Node]) -> list[Finding]:
    return merged(
        finding for host, node in nodes.items() for place in node.places for finding in about_place(host, place)
    )


def about_place(host: str, place: Place) -> list[Finding]:
    if place.problem:
        return [_unusable(host, place)]
    findings = [_kind(host, place)]
    for fault in place.faults:
        findings.append(
            error(place.use, f"{place.path}: {fault}",
                  "a job cannot rely on this file system: name a folder on another one", host)
        )  # fmt: skip
    least = FREE_BYTES_MIN[place.use]
    if place.free_bytes is not None and place.free_bytes < least:
        findings.append(
            warning(place.use, f"{place.path}: only {size_text(place.free_bytes)} free",
                    f"make room there, or name another folder with {_option(place.use)}", host)
        )  # fmt: skip
    if place.use == RUN_DIR and place.network and not place.locks_reach:
        findings.append(
            warning(place.use, f"{place.path}: locks on {place.type} are not told between hosts: two jobs started on "
                    "different hosts see each other only by their beat files",
                    "start one job at a time on a run directory, or mount it with locks (NFS without nolock, "
                    "Lustre with flock)", host)
        )  # fmt: skip
    findings += _slow(host, place)
    return findings


def _option(use: str) -> str:
    return {RUN_DIR: "-o", STORE: "LLMPI_HOME", STAGING: "--stage-dir"}[use]


def _unusable(host: str, place: Place) -> Finding:
    said = f"{place.path}: {place.problem}"
    if place.use == RUN_DIR:
        full = os.strerror(errno.ENOSPC) in place.problem
        return error(
            place.use,
            said,
            f"{'free space there, or ' if full else ''}name a folder that you may write to with -o",
            host,
        )
    if place.use == STORE:
        return warning(
            place.use, f"{said}; models given as files work", "set LLMPI_HOME to a folder that you may write to", host,
            command="export LLMPI_HOME=/path/you/may/write/to",
        )  # fmt: skip
    return warning(
        place.use, f"{said}; models are read from where they are", "name a local folder with --stage-dir", host
    )


def _kind(host: str, place: Place) -> Finding:
    kind = "network" if place.network else "memory" if place.memory else "local"
    parts = [f"{place.path}: {place.type or 'file system not told'} ({kind})"]
    if place.free_bytes is not None:
        parts.append(f"{size_text(place.free_bytes)} free")
    if place.write_bytes_per_s:
        parts.append(f"writes {place.write_bytes_per_s / 1e6:,.0f} MB/s")
    if place.read_bytes_per_s:
        parts.append(f"reads {place.read_bytes_per_s / 1e6:,.0f} MB/s")
    if place.fsync_s is not None:
        parts.append(f"fsync {time_text(place.fsync_s)}")
    if place.written and not place.faults:
        parts.append("rename, fsync and lock work")
    elif not place.written:
        parts.append("not written to")
    return ok(place.use, ", ".join(parts), host)


def _slow(host: str, place: Place) -> list[Finding]:
    findings = []
    if place.use == RUN_DIR and place.fsync_s is not None and place.fsync_s > SLOW_FSYNC_S:
        findings.append(
            warning(place.use, f"{place.path}: fsync takes {time_text(place.fsync_s)}",
                    "put the run directory on a faster file system, or commit more rarely (--commit-interval)", host)
        )  # fmt: skip
    if place.use == RUN_DIR and 0 < place.write_bytes_per_s < SLOW_WRITE_BYTES_PER_S:
        findings.append(
            warning(place.use, f"{place.path}: writes at {place.write_bytes_per_s / 1e6:.1f} MB/s only",
                    "put the run directory on a faster file system", host)
        )  # fmt: skip
    if place.use == STORE and place.network and 0 < place.read_bytes_per_s < SLOW_READ_BYTES_PER_S:
        findings.append(
            warning(place.use, f"{place.path}: reads at {place.read_bytes_per_s / 1e6:.0f} MB/s over the network",
                    "stage models to each node: --stage auto, and --stage-dir with a local folder", host)
        )  # fmt: skip
    if place.use == STAGING and place.network:
        findings.append(
            warning(place.use, f"{place.path} is itself on a network file system ({place.type})",
                    "name a folder of the node's own disk or memory with --stage-dir", host)
        )  # fmt: skip
    return findings


def about_model(models: Mapping[int, ModelFile], hosts: Mapping[int, str]) -> list[Finding]:
    """The model of -m, which every host must see alike."""
    findings = []
    problems: dict[str, list[str]] = {}
    for rank, model in models.items():
        if model.problem:
            problems.setdefault(model.problem, []).append(hosts[rank])
    for problem, where in problems.items():
        places = dict.fromkeys(where)
        findings.append(
            error("model", f"{listed(places)}: {problem}",
                  "give a path that all hosts see, or have each host copy it (--stage always)", *places)
        )  # fmt: skip
    seen = {rank: model for rank, model in models.items() if not model.problem}
    prints = {model.fingerprint for model in seen.values()}
    if len(prints) > 1:
        first = next(iter(seen.values())).fingerprint
        odd = dict.fromkeys(hosts[rank] for rank, model in seen.items() if model.fingerprint != first)
        findings.append(
            error("model", f"{listed(odd)} has another file under the same name than the others",
                  "put the same file everywhere, or use one shared path", *odd)
        )  # fmt: skip
    elif seen:
        one = next(iter(seen.values()))
        findings.append(ok("model", f"{one.path}, {size_text(one.size_bytes)}, {one.fingerprint[:29]}…"))
    return findings
