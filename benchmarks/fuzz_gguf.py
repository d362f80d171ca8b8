"""Damaged models by the hundred thousand: is each accepted or refused, in how much memory, and does ggml agree?

usage: python benchmarks/fuzz_gguf.py [--mutants 100000] [--seed N] [--no-ggml] [--llama] [--json]

Mutants are made by tests/storage/mutants.py; the same seed gives the same ones. Anything but acceptance or a
ModelFileError is an error of ours: it is printed with the mutant's number, and the exit status is 1. The whole run has
a limit of address space above what it began with (--headroom-mb), and every tenth mutant's peak is measured by
tracemalloc. ggml, in a process of its own, is asked about every file: what it refuses or aborts on must be refused.
Beyond that, "stricter" counts what ggml takes and we refuse. With --llama, llama.cpp loads the vocabulary of whatever
is accepted: it may refuse it, but not abort.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.storage.ggml import ask_ggml, ask_llama, ggml_library
from tests.storage.mutants import Mutant, mutants, reason, verdict

ACCEPTED = "accepted"
TRACED_EVERY = 10
ASKED_AT_ONCE = 1000


@dataclass
class Found:
    mutants: int = 0
    check_s: float = 0.0
    slowest_ms: float = 0.0
    peak_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    ggml: Counter[str] = field(default_factory=Counter)
    llama: Counter[str] = field(default_factory=Counter)
    stricter: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Asked:
    """Files that ggml, and if asked for llama.cpp, is still to be asked about, with what was said of them."""

    def __init__(self, folder: Path, found: Found, llama: bool) -> None:
        self._folder = folder
        self._found = found
        self._llama = llama
        self._library = ggml_library()
        self._waiting: list[tuple[int, str, Path]] = []
        if self._library is None:
            sys.exit("llama-cpp-python's ggml is not there; --no-ggml goes without")

    def add(self, number: int, why: str, mutant: Mutant) -> None:
        # Of a split model ggml reads one file at a time: what is wrong between files is not its concern.
        path = self._folder / f"{len(self._waiting)}.gguf"
        path.write_bytes(mutant.files[mutant.changed])
        self._waiting.append((number, why, path))
        if len(self._waiting) == ASKED_AT_ONCE:
            self.ask()

    def ask(self) -> None:
        if self._library is None or not self._waiting:
            return
        verdicts = ask_ggml(self._library, [path for _, _, path in self._waiting])
        for (number, why, _), said in zip(self._waiting, verdicts, strict=True):
            self._found.asked += 1
            self._found.ggml[said] += 1
            if why == ACCEPTED and said != "model":
                self._found.faults.append(f"mutant {number}: accepted, but ggml says: {said}")
            if why != ACCEPTED and said == "model":
                self._found.stricter[why] += 1
        if self._llama:
            self._ask_llama([(number, path) for number, why, path in self._waiting if why == ACCEPTED])
        self._waiting.clear()

    def _ask_llama(self, accepted: list[tuple[int, Path]]) -> None:
        for (number, _), said in zip(accepted, ask_llama([path for _, path in accepted]), strict=True):
            self._found.llama[said] += 1
            if said == "aborted":
                self._found.faults.append(f"mutant {number}: accepted, but llama.cpp aborts")


def check(folder: Path, number: int, mutant: Mutant, found: Found) -> str:
    traced = number % TRACED_EVERY == 0
    if traced:
        tracemalloc.start()
    began = time.perf_counter()
    try:
        said = verdict(folder, mutant)
        why = ACCEPTED if said is None else reason(said)
    # Everything that may not happen is to be seen, and the next mutant too.
    except Exception as error:
        why = f"FAULT {type(error).__name__}"
        found.faults.append(f"mutant {number}: {type(error).__name__}: {error}")
    took_s = time.perf_counter() - began
    if traced:
        found.peak_bytes = max(found.peak_bytes, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    else:
        found.slowest_ms = max(found.slowest_ms, 1e3 * took_s)
    found.mutants += 1
    found.check_s += took_s
    found.reasons[why] += 1
    return why


def limit_memory(headroom_mb: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (headroom_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def show(found: Found, seed: int) -> None:
    for why, count in found.reasons.most_common():
        print(f"{count:9,}  {why}")
    if found.asked:
        print(f"ggml was asked about {found.asked:,}: " + ", ".join(f"{n:,} {said}" for said, n in found.ggml.items()))
        if found.llama:
            print("llama.cpp about the accepted ones: " + ", ".join(f"{n:,} {said}" for said, n in found.llama.items()))
        for why, count in found.stricter.most_common():
            print(f"{count:9,}  stricter: {why}")
    accepted = found.reasons[ACCEPTED]
    print(
        f"{found.mutants:,} mutants (seed {seed}): {accepted:,} accepted, {found.mutants - accepted:,} refused for "
        f"{len(found.reasons) - 1} reasons, {len(found.faults)} faults; {found.mutants / found.check_s:,.0f} a second, "
        f"the slowest {found.slowest_ms:.1f} ms; peak {found.peak_bytes / 1e6:.2f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--headroom-mb", type=int, default=128)
    parser.add_argument("--no-ggml", action="store_true")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = Found()
    limit_memory(options.headroom_mb)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        asked = None if options.no_ggml else Asked(folder, found, options.llama)
        for number, mutant in enumerate(mutants(options.seed, options.mutants)):
            why = check(folder, number, mutant, found)
            if asked is not None:
                asked.add(number, why, mutant)
        if asked is not None:
            asked.ask()
    for fault in found.faults[:20]:
        print(fault, file=sys.stderr)
    if options.json:
        print(json.dumps({**asdict(found), "seed": options.seed}))
    else:
        show(found, options.seed)
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
