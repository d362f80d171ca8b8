"""How fast `llmpi models verify` hashes, against OpenSSL's own figure for this processor.

usage: python benchmarks/hashing.py [--gigabytes 1] [--files 2] [--repeats 5]

Files of random bytes are made in a temporary store, read once so that they are in the page cache, and verified; then
`openssl speed -evp sha256` runs in pieces of 1 MiB, on one thread and on as many as verify had. Medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.blobs import Blobs
from storage.manifest import Manifest, ModelName, StoredFile
from storage.modelstore import ModelStore
from storage.verifying import HASH_THREADS_MAX


def openssl_gigabytes_per_s(threads: int) -> float:
    words = ["openssl", "speed", "-seconds", "2", "-bytes", str(1 << 20), "-evp", "sha256"]
    words[2:2] = ["-multi", str(threads)] if threads > 1 else []
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(re.findall(r"([\d.]+)k\s*$", done.stdout.strip().splitlines()[-1])[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure hashing.")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, models = ModelStore(Path(folder)), []
        for number in range(chosen.files):
            path = Path(folder) / f"bytes-{number}"
            with path.open("wb") as file:
                for _ in range(int(chosen.gigabytes * 1e9 / chosen.files) >> 20):
                    file.write(os.urandom(1 << 20))
            blobs = Blobs(Path(folder))
            one = blobs.ingest(path, link=True)
            blobs.put(one)
            blobs.drop((one,))
            models.append(Manifest(ModelName(f"m{number}"), (StoredFile(one.digest, one.size, path.name),), "", ""))
        threads = min(HASH_THREADS_MAX, os.cpu_count() or 1, chosen.files)
        ours, single, many = [], [], []
        for _ in range(chosen.repeats):
            found = store.verify(models)
            ours.append(found.hashed_bytes / found.seconds / 1e9)
            single.append(openssl_gigabytes_per_s(1))
            many.append(openssl_gigabytes_per_s(threads))
    print(
        f"verify, {threads} threads: {statistics.median(ours):.2f} GB/s ({min(ours):.2f} to {max(ours):.2f}); openssl "
        f"speed on one thread {statistics.median(single):.2f}, on {threads} {statistics.median(many):.2f}: ratio "
        f"{statistics.median(ours) / statistics.median(many):.2f}"
    )


if __name__ == "__main__":
    main()
