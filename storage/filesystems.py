"""Which file system a path lies on, and whether many nodes read it over a network: from Linux's table of mounts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cephfs", "cifs", "coda", "cvmfs", "gfs2", "glusterfs", "gpfs", "lustre",
        "mmfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "quobyte", "smb2", "smb3", "smbfs",
        "wekafs",
    }
)  # fmt: skip
"""Types of file systems behind a network, parallel ones among them."""

NETWORK_FUSE = frozenset(
    {
        "alluxio-fuse", "beegfs", "blobfuse", "blobfuse2", "ceph", "ceph-fuse", "cvmfs", "cvmfs2", "dfuse", "gcsfuse",
        "glusterfs", "goofys", "hdfs", "juicefs", "lustre", "mountpoint-s3", "moosefs", "mfs", "quobyte", "rclone",
        "s3fs", "sshfs", "weedfs", "seaweedfs",
    }
)  # fmt: skip
"""What follows 'fuse.' of those; others (fuse.fuse-overlayfs, say) are local."""

LOCKED_EVERYWHERE = frozenset({"ceph", "cephfs", "gfs2", "gpfs", "mmfs", "ocfs2"})
"""Types of network file systems whose locks are always those of all hosts."""

MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted, its type ('ext4', 'nfs4', 'fuse.sshfs'; '' is unknown), and its options."""

    point: str
    type: str
    options: frozenset[str] = frozenset()

    @property
    def network(self) -> bool:
        kind, _, fuse = self.type.partition(".")
        return kind in NETWORK or (kind == "fuse" and fuse.lower() in NETWORK_FUSE)

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
    """This process's table of mounts; '' where there is none (macOS)."""
    try:
        return MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def mount_of(path: Path, table: str) -> Mount:
    """The mount that `path` lies on, links followed: the longest mount point above it, of equal ones the last."""
    real = os.path.realpath(path)
    best = Mount("", "")
    for line in table.splitlines():
        # 36 35 98:0 /root /point options [optional fields] - type source super-options; see proc(5)
        before, dash, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if not dash or len(left) < 6:
            continue
        point = _plain(left[4])
        above = point.rstrip("/") + "/"
        if (real == point or real.startswith(above)) and len(point) >= len(best.point):
            options = ",".join([left[5], *right[2:]])
            best = Mount(point, right[0], frozenset(options.split(",")))
    return best


def _plain(text: str) -> str:
    """Blanks, tabs, newlines and backslashes are written as \\040 and so on."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
