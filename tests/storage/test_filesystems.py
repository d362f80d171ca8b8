from __future__ import annotations

from pathlib import Path

import pytest

from storage.filesystems import mount_of, read_mounts

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw
30 27 0:40 / /work rw - lustre mds@tcp:/work rw
31 30 0:41 / /work/scratch rw - xfs /dev/sdb rw
32 27 0:42 / /home rw shared:9 - nfs4 server:/home rw
33 27 0:43 / /with\040blank rw - fuse.sshfs user@host: rw
34 27 0:44 / /dev/shm rw - tmpfs tmpfs rw
35 27 0:45 / /over rw - nfs server:/old rw
36 27 0:46 / /over rw - btrfs /dev/sdc rw
37 27 0:47 / /local rw - fuse.fuse-overlayfs fuse rw
38 27 0:48 / /p rw - 9p host rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "type", "network"),
    [
        ("/etc/hosts", "ext4", False),
        ("/work", "lustre", True),
        ("/work/models/a.gguf", "lustre", True),
        ("/workshop/a.gguf", "ext4", False),
        ("/work/scratch/a.gguf", "xfs", False),
        ("/home/me/a.gguf", "nfs4", True),
        ("/with blank/a.gguf", "fuse.sshfs", True),
        ("/dev/shm/a", "tmpfs", False),
        ("/over/a", "btrfs", False),
        ("/local/a", "fuse.fuse-overlayfs", False),
        ("/p/a", "9p", True),
    ],
)
def test_longest_mount_point_decides(path: str, type: str, network: bool) -> None:
    found = mount_of(Path(path), TABLE)
    assert (found.type, found.network) == (type, network)


@pytest.mark.parametrize(
    "kind", ["nfs", "gpfs", "beegfs", "ceph", "afs", "cifs", "smb3", "fuse.glusterfs", "fuse.juicefs"]
)
def test_network_file_systems(kind: str) -> None:
    assert mount_of(Path("/x/y"), f"1 0 0:1 / /x rw - {kind} somewhere rw").network


@pytest.mark.parametrize("kind", ["ext4", "xfs", "zfs", "overlay", "tmpfs", "fuseblk", "fuse.portal", "fuse", ""])
def test_local_file_systems(kind: str) -> None:
    assert not mount_of(Path("/x/y"), f"1 0 0:1 / /x rw - {kind} somewhere rw").network


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    table = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path.resolve()}/far rw - nfs x rw"
    assert mount_of(tmp_path / "link" / "a", table).network
    assert not mount_of(tmp_path / "a", table).network


def test_no_table_is_no_network(tmp_path: Path) -> None:
    assert not mount_of(tmp_path, "").network
    assert mount_of(tmp_path, read_mounts()).type
