"""Several hosts on one machine: network namespaces behind a bridge, each with a name and a /local of its own.

A host's processes run in its network namespace, a UTS namespace (its name) and a mount namespace (its scratch folder,
and what it cannot see). `tc` limits each host's link. mpirun reaches them by a script in ssh's place.
Root is needed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

NETWORK = "10.231.{job}.{host}"
JOBS = 250
TBF = "tbf rate 1gbit burst 256kb latency 50ms"


@dataclass(frozen=True)
class Hosts:
    """Names and addresses, and what mpirun is to be given. mpirun itself runs on the first one: see `command`."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    scratch: Path
    agent: Path

    def options(self, slots: int = 1, count: int | None = None) -> tuple[str, ...]:
        """Of Open MPI's mpirun, for `slots` ranks on each of the first `count` hosts."""
        hostfile = self.scratch / "hostfile"
        hostfile.write_text("".join(f"{address} slots={slots}\n" for address in self.addresses[:count]))
        return ("--hostfile", str(hostfile), *self.openmpi_reach())

    def openmpi_reach(self) -> tuple[str, ...]:
        """What Open MPI's mpirun needs beside a hostfile of these addresses."""
        network = self.addresses[0].rsplit(".", 1)[0] + ".0/24"
        return (
            "--map-by", "slot", "--bind-to", "none",
            "--prtemca", "plm_ssh_agent", str(self.agent), "--prtemca", "prte_if_include", network,
            "--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", network,
        )  # fmt: skip

    def mpich_options(self) -> tuple[str, ...]:
        """Of MPICH's mpirun, for a rank on each host."""
        hostfile = self.scratch / "hostfile"
        hostfile.write_text("".join(f"{address}:1\n" for address in self.addresses))
        return ("-f", str(hostfile), *self.mpich_reach())

    def mpich_reach(self) -> tuple[str, ...]:
        """What MPICH's mpirun needs beside a hostfile of these addresses.

        Ranks talk over their links, also those of one host, as hosts without common memory do.
        """
        return (
            "-bind-to", "none", "-launcher", "ssh", "-launcher-exec", str(self.agent), "-localhost",
            self.addresses[0], "-iface", "eth0", "-genv", "MPIR_CVAR_NOLOCAL", "1", "-genv", "UCX_TLS", "tcp,self",
            "-genv", "UCX_NET_DEVICES", "eth0",
        )  # fmt: skip

    def local(self, name: str) -> Path:
        """What the host `name` sees as its scratch folder, `self.scratch / 'local'`."""
        return self.scratch / f"local-{name}"

    def command(self, words: Sequence[str], host: int = 0) -> list[str]:
        """`words`, as a process of that host."""
        return [str(self.agent), self.addresses[host], f"exec {shlex.join(words)}"]

    def sent_bytes(self, name: str) -> int:
        """What the host `name` has sent over its link so far."""
        shown = _run("ip", "-j", "-s", "-n", name, "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


def cannot() -> str:
    """Why hosts cannot be made here; '' if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            return f"there is no {program} (Debian: iproute2, util-linux)"
    # All that hosts are made of, where it leaves no trace.
    veth, bridge = "ip link add veth8 type veth peer name veth9", "ip link add bridge9 type bridge"
    tried = f"{veth} && {bridge} && tc qdisc add dev veth8 root {TBF}"
    command = ["unshare", "-n", "-m", "-u", "sh", "-c", tried]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else ""


@contextmanager
def hosts(
    count: int,
    scratch: Path,
    *,
    rate: str | None = None,
    hidden: Mapping[int, Path] | None = None,
    bound: Mapping[int, tuple[Path, Path]] | None = None,
    job: int | None = None,
) -> Iterator[Hosts]:
    """`count` hosts. `rate`: of each one's link both ways, as tc writes it ('1gbit'). `hidden`: a folder that the
    host of that number sees empty. `bound`: a folder, and the one in whose place the host of that number sees it."""
    job = os.getpid() % 250 + 1 if job is None else job
    job = _own_bridge(job)
    tag = f"llm{job}"
    names = tuple(f"{tag}h{number}" for number in range(count))
    addresses = tuple(NETWORK.format(job=job, host=number + 1) for number in range(count))
    made = Hosts(names, addresses, scratch, scratch / "agent")
    (scratch / "local").mkdir(parents=True, exist_ok=True)
    for name in names:
        made.local(name).mkdir(exist_ok=True)
    _write_agent(made, hidden or {}, bound or {})
    try:
        _run("ip", "link", "set", f"{tag}br", "up")
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            outside = f"{tag}v{number}"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", outside, "master", f"{tag}br", "up")
            for words in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                          ("link", "set", "lo", "up")):  # fmt: skip
                _run("ip", "-n", name, *words)
            if rate is not None:
                limit = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
                _run("tc", "qdisc", "add", "dev", outside, *limit)
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for number in range(count):
            subprocess.run(["ip", "link", "del", f"{tag}v{number}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{tag}br"], capture_output=True, check=False)


def _write_agent(made: Hosts, hidden: Mapping[int, Path], bound: Mapping[int, tuple[Path, Path]]) -> None:
    """What mpirun calls as it would call ssh: options, a host, a command."""
    cases = []
    for number, (name, address) in enumerate(zip(made.names, made.addresses, strict=True)):
        hide = f"mount -t tmpfs tmpfs {hidden[number]} && " if number in hidden else ""
        hide += f"mount --bind {bound[number][0]} {bound[number][1]} && " if number in bound else ""
        cases.append(
            f"{address}|{name}) exec ip netns exec {name} unshare -m -u sh -c 'hostname {name} && "
            f'mount --bind {made.local(name)} {made.scratch / "local"} && {hide}eval "$1"\' sh "$*" ;;'
        )
    text = "\n".join(cases)
    made.agent.write_text(
        f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
case $host in
{text}
esac
echo "no host $host" >&2; exit 1
"""
    )
    made.agent.chmod(0o755)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _own_bridge(first: int) -> int:
    """Make the bridge of a job number that nobody uses, from `first` on. Of two who make the same one, one fails."""
    for job in chain(range(first, JOBS + 1), range(1, first)):
        words = ("ip", "link", "add", f"llm{job}br", "type", "bridge")
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return job
        if "File exists" not in done.stderr:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    raise RuntimeError(f"all {JOBS} networks are in use: ip link show type bridge")
