"""The links between rank 0 and the other hosts, what all ranks do together, and how far clocks are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from coordinator.doctor.findings import Finding, error, listed, ok, size_text, time_text, warning
from coordinator.versions import MISSING, UNTOLD

SLOW_LATENCY_S = 2e-3
SLOW_BYTES_PER_S = 50e6
"""Below a gigabit Ethernet's half."""
CLOCK_WARNING_S = 1.0


class LinkFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Between rank 0 and `rank` on `host`. None: not measured. `problem`: why not."""

    rank: int
    host: str
    same_host: bool = False
    round_trips: int = 0
    latency_s: float | None = None
    """Half of the median round trip, in Python as llmpi's messages go."""
    bytes_per_s: float | None = None
    payload_bytes: int = 0
    damaged: bool = False
    clock_offset_s: float | None = None
    """The other clock less rank 0's."""
    clock_error_s: float = 0.0
    problem: str = ""


class Together(msgspec.Struct, frozen=True, kw_only=True):
    """Collectives of all ranks, median seconds on rank 0. `large_bytes` is the size of the large reduction."""

    barrier_s: float | None = None
    small_s: float | None = None
    large_s: float | None = None
    large_bytes: int = 0
    wrong: bool = False
    problem: str = ""


def about_network(links: Sequence[LinkFacts], together: Together | None) -> list[Finding]:
    findings = [finding for link in links for finding in _link(link)]
    if together is not None:
        findings += _together(together)
    return findings


def _link(link: LinkFacts) -> list[Finding]:
    name = f"rank 0 to {link.host}"
    if link.problem:
        return [error(name, link.problem, "look at that host and at its link: firewall, interface, cable", link.host)]
    findings = []
    if link.damaged:
        findings.append(
            error(
                f"payload to {link.host}", f"{size_text(link.payload_bytes)} came back other than they were sent",
                "take that host or its network card out of the job; results over this link cannot be trusted",
                link.host,
            )
        )  # fmt: skip
    elif link.payload_bytes:
        findings.append(ok(f"payload to {link.host}", f"{size_text(link.payload_bytes)} there and back are unchanged"))
    if link.latency_s is not None:
        speed = f", {link.bytes_per_s / 1e6:,.0f} MB/s" if link.bytes_per_s else ""
        said = f"latency {time_text(link.latency_s)}{speed} ({'same host' if link.same_host else f'rank {link.rank}'})"
        slow = link.bytes_per_s is not None and link.bytes_per_s < SLOW_BYTES_PER_S
        if not link.same_host and (link.latency_s > SLOW_LATENCY_S or slow):
            findings.append(
                warning(
                    name, f"{said}: slow for a link within a cluster",
                    "see which network MPI uses and choose another (OMPI_MCA_btl_tcp_if_include, UCX_NET_DEVICES, "
                    "FI_PROVIDER: docs/transports.md); on a machine with more ranks than cores it is only that",
                    link.host,
                )
            )  # fmt: skip
        else:
            findings.append(ok(name, said))
    return findings


def _together(together: Together) -> list[Finding]:
    if together.problem:
        return [error("collectives", together.problem, "look at the ranks that do not answer, and at their hosts")]
    if together.wrong:
        return [
            error(
                "collectives", "a sum over all ranks came out wrong", "this MPI or this network damages data: change it"
            )
        ]
    parts = []
    if together.barrier_s is not None:
        parts.append(f"barrier {time_text(together.barrier_s)}")
    if together.small_s is not None:
        parts.append(f"allreduce of 8 B {time_text(together.small_s)}")
    if together.large_s is not None:
        parts.append(f"of {size_text(together.large_bytes)} {time_text(together.large_s)}")
    return [ok("collectives", ", ".join(parts) + " (median, all ranks; sums are right)")]


def about_clocks(links: Sequence[LinkFacts]) -> list[Finding]:
    """By the middle of the fastest round trip, which is right to half of it."""
    told = {link.host: link for link in links if link.clock_offset_s is not None and not link.same_host}
    if not told:
        return []
    findings = []
    for host, link in told.items():
        offset_s = link.clock_offset_s or 0.0
        if abs(offset_s) - link.clock_error_s > CLOCK_WARNING_S:
            findings.append(
                warning(
                    "clocks", f"{host}'s is {time_text(abs(offset_s))} {'ahead' if offset_s > 0 else 'behind'}",
                    "synchronise the clocks (chrony, NTP): times of change on a shared file system and log lines of "
                    "different hosts do not fit together; llmpi measures each interval on one clock",
                    host, command="timedatectl set-ntp true",
                )
            )  # fmt: skip
    good = [_offset(told[host]) for host in told if host not in {name for one in findings for name in one.where}]
    return [*findings, ok("clocks", f"offset from rank 0's: {listed(good)}")] if good else findings


def _offset(link: LinkFacts) -> str:
    return f"{link.host} {time_text(link.clock_offset_s or 0.0)} ± {time_text(link.clock_error_s)}"


def about_versions(versions: Mapping[int, Mapping[str, str]], hosts: Mapping[int, str]) -> list[Finding]:
    """Of Python and packages; rank 0's are what others are compared with."""
    own = versions.get(0, {})
    findings = []
    for name in own:
        others: dict[str, list[int]] = {}
        for rank, theirs in versions.items():
            if theirs.get(name, MISSING) != own[name]:
                others.setdefault(theirs.get(name, MISSING), []).append(rank)
        for version, ranks in others.items():
            where = listed(dict.fromkeys(hosts[rank] for rank in ranks))
            fix = f"'{name}=={own[name]}'" if name not in ("python", "llmpi") else ""
            findings.append(
                error(
                    name, f"rank {listed(ranks)} on {where} has {version}, rank 0 has {own[name]}: a job is refused",
                    "use one installation for all hosts (a shared folder, or the same image)", where,
                    command=f"python -m pip install {fix}" if fix else "",
                )
            )  # fmt: skip
    differing = {finding.check for finding in findings}
    for name in [name for name in own if name not in differing]:
        if own[name] == MISSING:
            findings.append(error(name, "it is not installed", "install it", command=f"python -m pip install {name}"))
        elif own[name] == UNTOLD:
            findings.append(
                warning(
                    name, "it is used from a folder, without having been installed: ranks with another version of it "
                    "would not be noticed", "install it; a checkout with `python -m pip install -e .`",
                )
            )  # fmt: skip
    if not findings:
        alike = "the same on all ranks: " if len(versions) > 1 else ""
        findings.append(ok("versions", alike + ", ".join(f"{name} {version}" for name, version in own.items())))
    return findings
