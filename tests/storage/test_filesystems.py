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
39 27 0:49 / /auto rw - autofs /etc/auto.home rw,indirect
40 39 0:50 / /auto/me rw - nfs4 server:/home/me rw
41 27 0:51 / /direct rw - autofs systemd-1 rw,direct
42 41 0:52 / /direct rw - nfs4 server:/direct rw
43 27 0:42 /sub /bound rw shared:9 - nfs4 server:/home rw
44 27 0:53 / /hidden/inner rw - nfs4 server:/inner rw
45 27 254:1 / /hidden rw - ext4 /dev/vdb rw
46 27 0:54 / /image rw - overlay overlay rw,lowerdir=/x:/y
47 46 0:55 / /image/models rw - virtiofs models rw
48 27 0:56 / /a\011b\134040c d rw - nfs4 server:/\043x rw
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
        ("/auto/me/a.gguf", "nfs4", True),
        ("/auto", "autofs", False),
        ("/direct/a.gguf", "nfs4", True),
        ("/bound/a.gguf", "nfs4", True),
        ("/hidden/inner/a.gguf", "ext4", False),
        ("/image/a.gguf", "overlay", False),
        ("/image/models/a.gguf", "virtiofs", True),
        ("/a\tb\\040c d/a.gguf", "nfs4", True),
    ],
)
def test_the_mount_that_the_kernel_would_find_decides(path: str, type: str, network: bool) -> None:
    found = mount_of(Path(path), TABLE)
    assert (found.type, found.network) == (type, network)


@pytest.mark.parametrize(
    "kind",
    [
        "nfs", "nfs4", "gpfs", "beegfs", "ceph", "afs", "cifs", "smb3", "9p", "lustre", "panfs", "wekafs", "orangefs",
        "virtiofs", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.s3fs",
        "fuse.gcsfuse", "fuse.daos", "fuse.dfuse", "fuse.rclone",
    ],
)  # fmt: skip
def test_network_file_systems(kind: str) -> None:
    assert mount_of(Path("/x/y"), f"1 0 0:1 / /x rw - {kind} somewhere rw").network


@pytest.mark.parametrize("kind", ["ext4", "xfs", "zfs", "overlay", "tmpfs", "fuseblk", "fuse.portal", "fuse", ""])
def test_local_file_systems(kind: str) -> None:
    assert not mount_of(Path("/x/y"), f"1 0 0:1 / /x rw - {kind} somewhere rw").network


@pytest.mark.parametrize("source", ["mountpoint-s3", "https://host/share", "gcsfuse"])
def test_a_fuse_file_system_without_a_kind_is_known_by_what_it_mounts(source: str) -> None:
    assert mount_of(Path("/x/y"), f"1 0 0:1 / /x rw - fuse {source} rw").network
    assert not mount_of(Path("/x/y"), "1 0 0:1 / /x rw - fuse /dev/fuse rw").network


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    table = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path.resolve()}/far rw - nfs x rw"
    assert mount_of(tmp_path / "link" / "a", table).network
    assert not mount_of(tmp_path / "a", table).network


def test_no_table_is_no_network(tmp_path: Path) -> None:
    assert not mount_of(tmp_path, "").network
    assert mount_of(tmp_path, read_mounts()).type
