"""Which file system a path lies on, and whether many nodes read it over a network: from Linux's table of mounts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MOUNTS = Path("/proc/self/mountinfo")

NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cephfs", "cifs", "coda", "cvmfs", "daos", "fhgfs", "gfs2", "glusterfs",
        "gpfs", "lustre", "mmfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "quobyte", "smb2",
        "smb3", "smbfs", "virtiofs", "wekafs",
    }
)  # fmt: skip
"""Types of file systems behind a network, parallel ones among them; 9p and virtiofs are what a host shares with its
virtual machines, in clouds mostly one storage with many."""

NETWORK_FUSE = frozenset(
    {
        "alluxio-fuse", "beegfs", "blobfuse", "blobfuse2", "ceph", "ceph-fuse", "cvmfs", "cvmfs2", "daos", "dfuse",
        "gcsfuse", "geesefs", "glusterfs", "goofys", "hdfs", "hf3fs", "juicefs", "lustre", "mfs", "moosefs",
        "mountpoint-s3", "objectivefs", "orangefs", "pvfs2fuse", "quobyte", "rclone", "s3fs", "s3ql", "saunafs",
        "seaweedfs", "sshfs", "weedfs",
    }
)  # fmt: skip
"""What follows 'fuse.' of those; others (fuse.fuse-overlayfs, say) are local."""

LOCKED_EVERYWHERE = frozenset({"ceph", "cephfs", "gfs2", "gpfs", "mmfs", "ocfs2"})
"""Types of network file systems whose locks are always those of all hosts."""

MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted, its type ('ext4', 'nfs4', 'fuse.sshfs'; '' is unknown), its options, and what is
    mounted ('/dev/sda1', 'server:/home')."""

    point: str
    type: str
    options: frozenset[str] = frozenset()
    source: str = ""

    @property
    def network(self) -> bool:
        kind, _, fuse = self.type.partition(".")
        if kind != "fuse":
            return kind in NETWORK
        if fuse:
            return fuse.lower() in NETWORK_FUSE
        # Some give no kind of their own: 'mountpoint-s3' or 'https://…' is what they say they mount.
        return self.source.lower() in NETWORK_FUSE or "://" in self.source

    @property
    def locks_reach(self) -> bool:
        """Whether a lock taken here is seen by every host that has the files. False where that is not known."""
        if not self.network:
            return True
        if self.type in ("nfs", "nfs4"):
            return not self.options & {"nolock", "local_lock=all", "local_lock=posix"}
        if self.type == "lustre":
            return "flock" in self.options
        return self.type in LOCKED_EVERYWHERE

    @property
    def memory(self) -> bool:
        return self.type in MEMORY


def read_mounts() -> str:
    """This process's table of mounts; '' where there is none (macOS). What an automounter has not mounted yet is not in
    it: look into a folder first."""
    try:
        return os.fsdecode(MOUNTS.read_bytes())
    except OSError:
        return ""


def mount_of(path: Path, table: str) -> Mount:
    """The mount that `path` lies on, links followed, as the kernel finds it: from the root, mount by mount.

    The longest mount point above the path is not it where something was mounted over a folder that has mounts in it.
    """
    real = os.path.realpath(path)
    entries = _entries(table)
    there = {entry.id for entry in entries}
    above = [
        entry for entry in entries if real.startswith(entry.mount.point.rstrip("/") + "/") or real == entry.mount.point
    ]
    found = Mount("", "")
    inner = [entry for entry in above if entry.parent not in there or entry.parent == entry.id]
    while inner:
        # The last one of those at the same point lies on top.
        nearest = min(reversed(inner), key=lambda entry: len(entry.mount.point))
        found = nearest.mount
        above.remove(nearest)
        inner = [entry for entry in above if entry.parent == nearest.id]
    return found


class _Entry(NamedTuple):
    """A line of the table."""

    id: str
    parent: str
    mount: Mount


def _entries(table: str) -> list[_Entry]:
    entries = []
    for line in table.split("\n"):
        # 36 35 98:0 /root /point options [optional fields] - type source super-options; see proc(5)
        before, dash, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if dash and len(left) >= 6:
            options = frozenset(",".join([left[5], *right[2:]]).split(","))
            source = _plain(right[1]) if len(right) > 1 else ""
            entries.append(_Entry(left[0], left[1], Mount(_plain(left[4]), right[0], options, source)))
    return entries


def _plain(text: str) -> str:
    """Blanks, tabs, newlines, backslashes and, in what is mounted, # are written as \\040 and so on."""
    for code, character in (("\\043", "#"), ("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
