"""A folder seen through a real network file system: sshfs, with an SFTP server of its own behind two pipes.

No SSH daemon is needed. What the server reads and writes is counted by the kernel; killing it is what a cut network or
a dead file server is to those who have the folder mounted. Root is needed, and FUSE.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.filesystems import mount_of, read_mounts
from tests.system.runs import until

SFTP_PACKAGE = "openssh-sftp-server"
SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


@dataclass(frozen=True)
class NetworkMount:
    """`folder` is seen at `point`."""

    folder: Path
    point: Path
    server: subprocess.Popen[bytes]
    client: subprocess.Popen[bytes]

    def sent_bytes(self) -> int:
        """What the server has read of files and of its pipe so far: at least what it has sent of files."""
        return self._count("rchar")

    def _count(self, name: str) -> int:
        told = Path(f"/proc/{self.server.pid}/io").read_text(encoding="ascii")
        return int(dict(line.split(": ") for line in told.splitlines())[name])

    def cut(self) -> None:
        """The server is gone. sshfs ends, and the mount with it: open files are not connected to anything, and at
        `point` there is an empty folder."""
        self.server.kill()
        self.client.wait(10)

    def kill(self) -> None:
        """sshfs itself is killed: the mount stays, and whatever is looked at below `point` is not connected."""
        self.client.kill()
        self.client.wait(10)


def require() -> None:
    """Skip the test, with the reason, where there can be no such mount. Under CI, which installs programs that are
    missing, one that is not there fails it."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting with FUSE needs root and /dev/fuse")
    missing = [name for name, found in (("sshfs", shutil.which("sshfs")), (SFTP_PACKAGE, _sftp_server())) if not found]
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"please install: {' '.join(missing)}")


def _sftp_server() -> str:
    return next((path for path in SFTP_SERVERS if os.access(path, os.X_OK)), "")


@contextmanager
def network_mount(folder: Path, point: Path, *options: str) -> Iterator[NetworkMount]:
    """Mount `folder` at `point`; both are made if they are not there. `options` are sshfs's, each after an -o."""
    folder.mkdir(parents=True, exist_ok=True)
    point.mkdir(parents=True, exist_ok=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = subprocess.Popen(
            [_sftp_server()], stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL
        )
        words = ["sshfs", "-f", f":{folder}", str(point), "-o", "passive"]
        words += [word for option in options for word in ("-o", option)]
        client = subprocess.Popen(words, stdin=ours.fileno(), stdout=ours.fileno(), start_new_session=True)
    try:
        until(lambda: client.poll() is not None or mount_of(point, read_mounts()).type == "fuse.sshfs", f"{point}")
        assert client.poll() is None, "sshfs has ended"
        yield NetworkMount(folder, point, server, client)
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=False, capture_output=True)
        for process in (server, client):
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
