"""Which requests a job of several takes: of slice I of N those whose number in the input is I modulo N.

Neighbours in a file are often alike, so dealing them in turn gives all slices about the same work, and every request
keeps the number (and so the seed and the custom_id) that it has in the whole input. Each job reads the whole input for
that, and parses its own lines alone.

The run directory of slice I of `-o RUN_DIR` is RUN_DIR/slice-I. `slice_dirs` finds all of them again.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from scheduling.errors import ConfigError, RunDirError
from storage.runjson import RUN_NAME, read_run

_TEXT = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
_NAME = re.compile(r"slice-(\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Slice:
    """Slice `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        return number % self.count == self.index

    def place(self, number: int) -> int:
        """How many requests of this slice come before request `number`, which is one of them."""
        return number // self.count

    def end(self, total: int) -> int:
        """The number behind that of the last of `total` requests of this slice."""
        return 0 if total == 0 else (total - 1) * self.count + self.index + 1

    def directory(self, run_dir: Path) -> Path:
        return run_dir / f"slice-{self.index}"


WHOLE = Slice()


def parse_slice(text: str) -> Slice:
    """'3/8' is the fourth of eight. Raises ConfigError."""
    found = _TEXT.fullmatch(text.strip())
    if found is None or not int(found[1]) < int(found[2]):
        raise ConfigError(f"--slice {text}: give I/N, as 0/4, 1/4, 2/4 and 3/4 for the four jobs of an array")
    return Slice(int(found[1]), int(found[2]))


def slice_dirs(run_dir: Path) -> list[Path]:
    """The run directories of all slices of `run_dir`, by number; empty if it is a run of its own, or none.

    Those of slices that no job has begun are named, too, and not there. Of a directory that may not be looked into,
    whoever reads its run.json says so.

    Raises:
        RunDirError: the slices there do not belong together.
    """
    if os.path.exists(run_dir / RUN_NAME):
        return []
    try:
        names = os.listdir(run_dir)
    except OSError:
        return []
    begun = {int(found[1]): run_dir / name for name in names if (found := _NAME.fullmatch(name))}
    begun = {index: path for index, path in sorted(begun.items()) if os.path.exists(path / RUN_NAME)}
    counts: dict[int, Path] = {}
    for path in begun.values():
        said = read_run(path)["identity"].get("input", {}).get("slice")
        if said is None:
            raise RunDirError(f"{path} is no slice of a run: it was made without --slice")
        counts.setdefault(parse_slice(said).count, path)
    if len(counts) > 1:
        (one, first), (other, second) = list(counts.items())[:2]
        raise RunDirError(
            f"{run_dir} has slices that do not belong together: {first.name} is one of {one}, {second.name} one of "
            f"{other}. Remove those that are not wanted"
        )
    return [Slice(index, count).directory(run_dir) for count in counts for index in range(count)]
