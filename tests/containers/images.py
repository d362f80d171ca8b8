"""The real image, built by buildah from the Dockerfile, without a registry: its base is made by debootstrap.

Root is needed, and Debian's packages. The wheel of llama.cpp that this environment was installed from is used where
there is one, for compiling takes many minutes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT

BASE = "docker.io/library/debian:12-slim"
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_S = 1500.0


def cannot() -> str:
    """Why images cannot be built here; '' if they can."""
    if os.geteuid() != 0:
        return "debootstrap and mounting images need root"
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            return f"there is no {program} (Debian: buildah, debootstrap)"
    return ""


@dataclass(frozen=True)
class Builder:
    """buildah with images of its own in `folder`."""

    folder: Path

    def __call__(self, *words: str | Path) -> str:
        command = ["buildah", "--root", self.folder / "images", "--runroot", self.folder / "run", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"BUILDAH_ISOLATION": "chroot"}, capture_output=True, text=True,
            check=False, timeout=BUILD_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout.strip()

    def make_base(self) -> None:
        """The image that the Dockerfile begins with, as Debian publishes it, made from Debian's packages."""
        tree = self.folder / "base"
        command = ["debootstrap", "--variant=minbase", "bookworm", str(tree), MIRROR]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_S)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        container = self("from", "scratch")
        # Devices are to be made anew, not read: cp knows that, Python's copytree does not.
        subprocess.run(["cp", "-a", f"{tree}/.", self("mount", container)], check=True, timeout=BUILD_S)
        self("commit", "-q", container, BASE)
        self("rm", container)
        shutil.rmtree(tree)

    def build(self, tag: str, wheels: Path) -> None:
        """The Dockerfile's image. pip inside trusts whom this machine trusts, and takes wheels from `wheels` too."""
        settings = self.folder / "pip.conf"
        settings.write_text("[global]\ncert = /host/certificates\nfind-links = /host/wheels\n")
        mounts = {settings: "/etc/pip.conf", CERTIFICATES: "/host/certificates", wheels: "/host/wheels"}
        volumes = [word for here, there in mounts.items() for word in ("-v", f"{here}:{there}:ro")]
        self("bud", "--pull-never", "--layers=false", "-f", "containers/Dockerfile", "-t", tag, *volumes, ".")

    @contextmanager
    def tree(self, tag: str) -> Iterator[Path]:
        """The root of a new container of an image."""
        container = self("from", "--pull-never", f"localhost/{tag}")
        try:
            yield Path(self("mount", container))
        finally:
            self("umount", container)
            self("rm", container)


def in_container(tree: Path, mounts: Mapping[Path, str], environ: Mapping[str, str], command: Sequence[str]) -> str:
    """A shell script that becomes `command` in a container as its user 1000, as a container engine would start it:
    `mounts` bound to places in it, `environ` its only variables, /proc, /sys and /dev there. To be run in a mount
    namespace of its own."""
    lines = ["set -e", f"mount -t proc proc {tree}/proc", f"mount -t sysfs sysfs {tree}/sys"]
    lines.append(f"mount --rbind /dev {tree}/dev")
    for here, there in mounts.items():
        lines += [f"mkdir -p {tree}{there}", f"mount --bind {here} {tree}{there}"]
    lines.append(f"mount -t tmpfs tmpfs {tree}/tmp")
    variables = [f"{name}={value}" for name, value in environ.items()]
    inside = ["/usr/bin/env", "-i", "-C", "/data", *variables, *command]
    lines.append(f"exec {shlex.join(['chroot', '--userspec=1000:1000', str(tree), *inside])}")
    return "\n".join(lines)
