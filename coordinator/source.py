"""Where requests come from: a file or a Python iterable, read lazily, as `Arrival`s in the order of the input.

Both sources answer `read(max_requests, max_bytes)`, so that whoever asks decides how much is in memory. Each
request leaves with its number, its custom_id and a line that a worker can parse by itself. A request that cannot
be run arrives with its error and fails alone. Requests done in an earlier session of the run are passed over.

Sources know nothing of ranks, assignments or results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coordinator.arrivals import (
    Arrival,
    id_or_default,
    mark_duplicates,
    of_checked,
    of_refused,
    of_request,
    of_text,
)
from coordinator.ids import IdSet, hash_id
from coordinator.inputfile import (
    Block,
    Checked,
    Format,
    Origin,
    Progress,
    check_file,
    default_id,
    empty_input,
    ends_identity,
    line_blocks,
    look_ahead,
    open_input,
    same_input,
    sniff_format,
    too_long,
)
from coordinator.slicing.slices import WHOLE, Slice
from scheduling.errors import InputError, RequestError
from scheduling.requestlines import prompt_line
from scheduling.requests import Request, Sampling

__all__ = ["Arrival", "FileSource", "IterableSource", "Source", "same_input", "sniff_format"]

SKIPPED_BYTES_MAX = 64 << 20
"""How much of done requests one call to `read` passes over before it returns, so that rank 0 stays responsive."""


class Source(Protocol):
    """What the coordinator reads from."""

    @property
    def ended(self) -> bool:
        """Whether `read` has nothing more to give."""

    @property
    def total(self) -> int | None:
        """How many requests there are, done ones included; None if that is not known yet."""

    def skip(self, done: npt.NDArray[np.bool_]) -> None:
        """Pass over the requests whose index is True in `done`. To be called before the first `read`."""

    def read(self, max_requests: int, max_bytes: int) -> list[Arrival]:
        """The next requests: at most so many, and no more once their lines have `max_bytes` together.

        It can be empty before the end, where much was passed over: `ended` tells.
        """

    def fetch(self, index: int) -> bytes | None:
        """The line of a request again, or None if this source cannot go back."""

    def identity(self) -> dict[str, int | str]:
        """What tells this input from another (see `same_input`), for run.json."""

    def close(self) -> None: ...


class GatedSource:
    """`source`, which gives nothing as long as `is_open` says no."""

    def __init__(self, source: Source, is_open: Callable[[], bool]) -> None:
        self._source = source
        self._is_open = is_open

    @property
    def ended(self) -> bool:
        return self._source.ended

    @property
    def total(self) -> int | None:
        return self._source.total

    def skip(self, done: npt.NDArray[np.bool_]) -> None:
        self._source.skip(done)

    def read(self, max_requests: int, max_bytes: int) -> list[Arrival]:
        return self._source.read(max_requests, max_bytes) if self._is_open() else []

    def fetch(self, index: int) -> bytes | None:
        return self._source.fetch(index)

    def identity(self) -> dict[str, int | str]:
        return self._source.identity()

    def close(self) -> None:
        self._source.close()


# ---------------------------------------------------------------- a file


class FileSource:
    """Requests from a file, read in blocks: memory does not grow with the file.

    With `precheck` all of the file is validated first, and an InputError names what is wrong with it; then `total`
    and `fetch` are known. Without, a bad line or a second use of a custom_id fails alone when it arrives.
    `lengths`: how long the requests are, those without a limit of their own taken to have `max_tokens` of output.
    `part`: the requests that are read; they keep the numbers that they have in the whole file. `origin`: see
    `check_file`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        format: Format | None = None,
        defaults: Sampling | None = None,
        done: npt.NDArray[np.bool_] | None = None,
        precheck: bool = True,
        on_progress: Progress | None = None,
        max_tokens: int = 512,
        part: Slice = WHOLE,
        origin: Origin | None = None,
    ) -> None:
        self._path = path = Path(path)
        self._part = part
        self._defaults = Sampling() if defaults is None else defaults
        self._format: Format = sniff_format(path) if format is None else format
        self._checked: Checked | None = None
        if precheck:
            self._checked = check_file(
                path, self._format, self._defaults, on_progress, max_tokens=max_tokens, part=part, origin=origin
            )
            self.lengths = self._checked.lengths
        else:
            self.lengths = look_ahead(path, self._format, self._defaults, max_tokens, part)
        self._ids = None if precheck or self._format == "text" else IdSet()
        self._arrive = self._choose_arrive()
        self._done = b""
        self._index = 0
        self._block = Block(0, [])
        self._place = 0
        self._skipped_ids = bytearray()
        self._file = open_input(path)
        self._blocks = line_blocks(self._file)
        self._exhausted = False
        if self._checked is not None:
            self._refuse_change(self._checked)
        else:
            self._refuse_empty()
        if done is not None:
            self.skip(done)

    def _choose_arrive(self) -> Callable[[int, bytes, Sampling], Arrival]:
        if self._format == "text":
            return of_text
        return of_request if self._checked is None else of_checked

    def _refuse_change(self, checked: Checked) -> None:
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != (checked.bytes, checked.mtime_ns):
            raise InputError(f"{self._path} was changed while it was checked; start again when it is written")

    def _refuse_empty(self) -> None:
        while self._next_block():
            if self._block.dropped or any(line.strip() for line in self._block.lines):
                return
        raise empty_input(self._path)

    @property
    def format(self) -> Format:
        return self._format

    @property
    def total(self) -> int | None:
        if self._checked is not None:
            return self._checked.total
        return len(range(self._part.index, self._index, self._part.count)) if self._exhausted else None

    @property
    def ended(self) -> bool:
        if self._checked is not None and self._index >= self._part.end(self._checked.total):
            return True
        return self._exhausted

    def skip(self, done: npt.NDArray[np.bool_]) -> None:
        self._done = np.asarray(done, np.bool_).tobytes()

    def read(self, max_requests: int, max_bytes: int) -> list[Arrival]:
        arrivals: list[Arrival] = []
        size = skipped = 0
        while len(arrivals) < max_requests and size < max_bytes and not self.ended:
            if self._place >= len(self._block.lines) and not self._next_block():
                break
            line = self._block.lines[self._place]
            self._place += 1
            stripped = line.strip()
            if not stripped and not self._block.dropped:
                continue
            index = self._index
            if not self._part.has(index):
                self._index += 1
                skipped += len(line) + 1
                if skipped >= SKIPPED_BYTES_MAX:
                    break
                continue
            done = index < len(self._done) and bool(self._done[index])
            if done and arrivals and self._ids is not None:
                self._place -= 1  # ids are compared in the input's order: skipped lines first, then arrivals
                break
            self._index += 1
            if done:
                skipped += len(line) + 1
                if self._ids is not None:
                    self._skipped_ids += hash_id(id_or_default(stripped, index))
                if skipped >= SKIPPED_BYTES_MAX:
                    break
            elif self._block.dropped:
                arrivals.append(of_refused(index, b"", too_long(self._block.dropped)))
            else:
                # A text prompt keeps its spaces; around JSON they mean nothing.
                arrival = self._arrive(index, line if self._format == "text" else stripped, self._defaults)
                arrivals.append(arrival)
                size += len(arrival.line)
        if self._ids is not None and (arrivals or self._skipped_ids):
            mark_duplicates(self._ids, arrivals, self._skipped_ids)
            self._skipped_ids.clear()
        if self._place >= len(self._block.lines):
            self._next_block()  # so that `ended` is true with the last request, not one call later
        return arrivals

    def _next_block(self) -> bool:
        block = next(self._blocks, None)
        self._block = Block(0, []) if block is None else block
        self._place = 0
        self._exhausted = block is None
        return block is not None

    def fetch(self, index: int) -> bytes | None:
        if self._checked is None or not 0 <= index < self._part.end(self._checked.total) or not self._part.has(index):
            return None
        offsets, place = self._checked.offsets, self._part.place(index)
        end = int(offsets[place + 1]) if place + 1 < len(offsets) else self._checked.bytes
        start = int(offsets[place])
        line = os.pread(self._file.fileno(), end - start, start).split(b"\n", 1)[0]
        return self._arrive(index, line if self._format == "text" else line.strip(), self._defaults).line

    def identity(self) -> dict[str, int | str]:
        known = ends_identity(self._path, self._format)
        return known if self._checked is None else {**known, "sha256": self._checked.sha256}

    def close(self) -> None:
        self._file.close()


# ---------------------------------------------------------------- Python objects


class IterableSource:
    """Requests from Python objects: strings, dicts (a body, or a whole batch line), or `Request`s.

    The iterable is consumed as requests are read, never ahead. A bad one fails alone.
    """

    def __init__(
        self,
        prompts: Iterable[str | Mapping[str, Any] | Request],
        defaults: Sampling | None = None,
        *,
        first_index: int = 0,
    ) -> None:
        """`first_index` is the number of the first request, where others came before in the same job."""
        if isinstance(prompts, str | bytes | Mapping | Request) or not isinstance(prompts, Iterable):
            raise InputError(
                f"prompts is of type {type(prompts).__name__}; give a list, or another iterable of prompts: [prompt]"
            )
        self._first = first_index
        self._total = first_index + len(prompts) if isinstance(prompts, Sized) else None
        self._prompts: Iterator[object] = iter(prompts)
        self._defaults = Sampling() if defaults is None else defaults
        self._done = b""
        self._ids = IdSet()
        self._index = first_index
        self._exhausted = False

    @property
    def ended(self) -> bool:
        return self._exhausted or self._index == self._total

    @property
    def total(self) -> int | None:
        last = self._index if self._exhausted else self._total
        return None if last is None else last - self._first

    def skip(self, done: npt.NDArray[np.bool_]) -> None:
        self._done = np.asarray(done, np.bool_).tobytes()

    def read(self, max_requests: int, max_bytes: int) -> list[Arrival]:
        arrivals: list[Arrival] = []
        size = 0
        while len(arrivals) < max_requests and size < max_bytes and not self.ended:
            try:
                prompt = next(self._prompts)
            except StopIteration:
                self._exhausted = True
                break
            index = self._index
            self._index += 1
            if index < len(self._done) and self._done[index]:
                continue
            arrivals.append(self._arrive(index, prompt))
            size += len(arrivals[-1].line)
        if arrivals:
            mark_duplicates(self._ids, arrivals, bytearray())
        return arrivals

    def _arrive(self, index: int, prompt: object) -> Arrival:
        try:
            line = prompt_line(prompt, default_id(index))
        except RequestError as error:
            return of_refused(index, b"", error)
        return of_request(index, line, self._defaults)

    def fetch(self, index: int) -> bytes | None:
        return None

    def identity(self) -> dict[str, int | str]:
        return {"format": "python"}

    def close(self) -> None:
        """Nothing to close: the iterable is the caller's."""
