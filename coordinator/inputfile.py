"""A file of requests as bytes: its format, its lines in bounded memory, and the pass that checks it before a run.

`line_blocks` cuts a file into lists of lines, about a MiB at a time, however large the file or a line is.
`check_file` reads all of it once: every line must be a request, every custom_id its own. It keeps 16 bytes a
request while it runs (a hash of the id, the line's offset) and 8 afterwards (the offset). On the way it learns how long
the requests are; `look_ahead` learns that from the beginning of a file alone.

This module does not know which requests are done, who runs them, or what becomes of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.ids import hash_id, repeated
from coordinator.slicing.slices import WHOLE, Slice
from scheduling.embeddings import may_embed
from scheduling.errors import InputError, RequestError
from scheduling.lengths import Lengths, LengthScan
from scheduling.requests import Request, Sampling, parse_request

Format = Literal["jsonl", "text"]
Progress = Callable[[int, int], None]
"""Called as (bytes done, bytes in all), about once a block."""

BLOCK_BYTES = 1 << 20
LINE_BYTES_MAX = 64 << 20
BOM = b"\xef\xbb\xbf"
LOOK_AHEAD_REQUESTS = 256
PROBLEMS_SHOWN = 5
PROBLEMS_MAX = 1_000
"""After so many bad lines a check stops: the file is of another kind."""

LOOK_AHEAD_LINES = 10_000
LOOK_AHEAD_BYTES = 64 << 20
"""How far `look_ahead` reads, about."""

_ENDS_BYTES = 1 << 20
_MAGICS = {
    b"\x1f\x8b": "is compressed with gzip; decompress it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it first (unzstd)",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"PAR1": "is a Parquet file; export it as JSON lines first",
    b"GGUF": "is a model, not a file of requests; were -m and -i swapped?",
    b"\xff\xfe": "is UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; convert it first (iconv -f UTF-16 -t UTF-8)",
}


def open_input(path: Path) -> BinaryIO:
    """The file at `path`, opened without Python's buffer. Raises InputError for what is no readable file."""
    if str(path) == "-":
        raise InputError(
            "standard input cannot be the input: a run reads its requests again when it resumes; "
            "write them to a file first (… > requests.jsonl)"
        )
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a directory; name a file of requests in it")
        if not stat.S_ISREG(mode):
            way = f", or give it as standard input (-i - < {path})" if stat.S_ISFIFO(mode) else ""
            raise InputError(f"{path} is no regular file, and requests are read more than once; copy it to one{way}")
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; -i takes a file of requests") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    head = os.pread(file.fileno(), 4, 0)
    for magic, words in _MAGICS.items():
        if head.startswith(magic):
            file.close()
            raise InputError(f"{path} {words}")
    return file


def sniff_format(path: Path) -> Format:
    """How the file is written: by its suffix (.txt; .jsonl, .ndjson, .json), else by how its first line begins."""
    suffix = path.suffix.lower()
    with open_input(path) as file:
        if suffix == ".txt":
            return "text"
        if suffix in (".jsonl", ".ndjson", ".json"):
            return "jsonl"
        for block in line_blocks(file):
            for line in block.lines:
                if line.strip():
                    return "jsonl" if line.lstrip().startswith(b"{") else "text"
    return "jsonl"


def only_embeddings(path: Path, form: Format) -> bool:
    """Whether the first requests of the file, some hundred, all seem to ask for embeddings."""
    if form == "text":
        return False
    with open_input(path) as file:
        block = next(line_blocks(file), Block(0, []))
    lines = [line for line in block.lines if line.strip()][:LOOK_AHEAD_REQUESTS]
    return bool(lines) and all(may_embed(line) for line in lines)


class Block(NamedTuple):
    """Whole lines without their newlines; `offset` is where the first one begins.

    `dropped` > 0: the block is one line of that many bytes, too long to be kept; `lines` has its beginning only.
    """

    offset: int
    lines: list[bytes]
    dropped: int = 0


class Readable(Protocol):
    """Of a file what `line_blocks` needs."""

    def read(self, size: int, /) -> bytes: ...

    def tell(self) -> int: ...


def line_blocks(
    file: Readable,
    *,
    block_bytes: int = BLOCK_BYTES,
    line_bytes_max: int = LINE_BYTES_MAX,
    on_block: Callable[[bytes], object] | None = None,
) -> Iterator[Block]:
    """The lines of `file` from where it stands. `on_block` sees every byte. A byte order mark is passed over."""
    offset = file.tell()
    parts: list[bytes] = []  # the beginning of a line whose end has not been read yet
    parts_bytes = 0
    at_start = offset == 0
    while block := file.read(block_bytes):
        if on_block is not None:
            on_block(block)
        if at_start and block.startswith(BOM):
            block, offset = block[len(BOM) :], len(BOM)
        at_start = False
        end = block.find(b"\n") if parts else -1
        if parts and end >= 0:
            yield _joined(offset, parts, parts_bytes, block[:end], line_bytes_max)
            offset += parts_bytes + end + 1
            block, parts, parts_bytes = block[end + 1 :], [], 0
        last = block.rfind(b"\n") if not parts else -1
        if last >= 0:
            yield Block(offset, block[:last].split(b"\n"))
            offset += last + 1
            block = block[last + 1 :]
        if block:
            parts_bytes += len(block)
            if parts_bytes <= line_bytes_max or not parts:
                parts.append(block)
    if parts:
        yield _joined(offset, parts, parts_bytes, b"", line_bytes_max)


def _joined(offset: int, parts: list[bytes], parts_bytes: int, tail: bytes, line_bytes_max: int) -> Block:
    length = parts_bytes + len(tail)
    if length > line_bytes_max:
        return Block(offset, [parts[0][:256]], length)
    return Block(offset, [b"".join((*parts, tail))])


def too_long(length: int) -> RequestError:
    return RequestError(f"the line has {length:,} bytes; at most {LINE_BYTES_MAX:,} are read")


def empty_input(path: Path) -> InputError:
    return InputError(f"{path} is empty: there is no request in it; write one per line")


def text_of(line: bytes) -> str:
    """The prompt on a line of a text file. Raises RequestError with the position of a byte that is not UTF-8."""
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = error.start
        raise RequestError(
            f"byte {wrong + 1} of the line (0x{line[wrong]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None


def default_id(index: int) -> str:
    """The custom_id of a request that has none."""
    return f"request-{index}"


# ---------------------------------------------------------------- identity


def ends_identity(path: Path, form: Format) -> dict[str, int | str]:
    """What tells this input from another at the cost of two reads: size, and SHA-256 of first and last MiB."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        ends = hashlib.sha256(os.pread(file.fileno(), _ENDS_BYTES, 0))
        ends.update(os.pread(file.fileno(), _ENDS_BYTES, max(0, size - _ENDS_BYTES)))
    return {"bytes": size, "format": form, "ends_sha256": ends.hexdigest()}


def same_input(one: dict[str, int | str], other: dict[str, int | str]) -> bool:
    """Whether two identities can be of the same input: what both of them know is equal."""
    return all(one[key] == other[key] for key in one.keys() & other.keys())


# ---------------------------------------------------------------- the check


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check found: all lines are requests. `total` are those of the slice that was asked for; `offsets[k]` is
    where the line of the k-th of them begins."""

    total: int
    lengths: Lengths | None
    bytes: int
    sha256: str
    mtime_ns: int
    offsets: npt.NDArray[np.int64]


Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What lines were made from, one of each `unit` there: so errors name it, not the file that was made."""

    name: str
    unit: Unit


class Problems:
    """The first few bad lines (or rows), and how many there are."""

    def __init__(self, unit: Unit = "line") -> None:
        self.unit = unit
        self.shown: list[str] = []
        self.count = 0

    def add(self, number: int, reason: object) -> None:
        self.count += 1
        if len(self.shown) < PROBLEMS_SHOWN:
            self.shown.append(f"{self.unit} {number}: {reason}")

    def error(self, path: Path | str) -> InputError:
        if self.count == 1:
            return InputError(f"{path}, {self.shown[0]}")
        more = self.count - len(self.shown)
        count = f"{'at least ' if self.count >= PROBLEMS_MAX else ''}{self.count:,}"
        said = [f"{path}: {count} {self.unit}s cannot be used", *self.shown]
        return InputError("\n  ".join([*said, f"and {more:,} more"] if more else said))


def look_ahead(path: Path, form: Format, defaults: Sampling, max_tokens: int, part: Slice = WHOLE) -> Lengths | None:
    """How long the first requests of the file at `path` are, those of one slice; None if there are none. Bad lines are
    passed over."""
    scan = LengthScan(max_tokens)
    lines = number = 0
    with open_input(path) as file:
        for block in line_blocks(file):
            for line in block.lines if not block.dropped else []:
                if lines >= LOOK_AHEAD_LINES or block.offset >= LOOK_AHEAD_BYTES:
                    return scan.found(whole=False)
                lines += 1
                stripped = line.strip()
                number += bool(stripped)
                if stripped and not part.has(number - 1):
                    continue
                if form == "text":
                    if stripped:
                        scan.add_text(line)
                elif stripped:
                    with contextlib.suppress(RequestError):
                        scan.add(_request(stripped, defaults, lines))
    return scan.found(whole=True)


def check_file(
    path: Path,
    form: Format,
    defaults: Sampling,
    on_progress: Progress | None = None,
    *,
    max_tokens: int,
    part: Slice = WHOLE,
    origin: Origin | None = None,
) -> Checked:
    """Read all of the file at `path` and validate it. `max_tokens`: of a request that does not say. Of a slice its own
    lines alone are looked at. `origin`: what errors of lines name in place of `path`.

    Raises InputError: no readable file, no request in it (a slice may have none), lines that are no requests (the
    first five, and how many), a custom_id that is there twice (both line numbers).
    """
    whole = hashlib.sha256()
    hashes = bytearray()
    offsets = array("q")
    origin = origin or Origin(str(path), "line")
    problems = Problems(origin.unit)
    scan = LengthScan(max_tokens)
    line_number = number = 0
    with open_input(path) as file:
        status = os.fstat(file.fileno())
        for block in line_blocks(file, on_block=whole.update):
            offset = block.offset
            for line in block.lines:
                line_number += 1
                stripped = line.strip()
                own = part.has(number)
                number += bool(stripped or block.dropped)
                if own and (stripped or block.dropped):
                    try:
                        if block.dropped:
                            raise too_long(block.dropped)
                        if form == "text":
                            text_of(line)
                            scan.add_text(line)
                        else:
                            request = _request(stripped, defaults, number - 1)
                            scan.add(request)
                            hashes += hash_id(request.custom_id)
                    except RequestError as error:
                        problems.add(line_number, error)
                        if problems.count >= PROBLEMS_MAX:
                            raise problems.error(origin.name) from None
                    offsets.append(offset)
                offset += len(line) + 1
            if on_progress is not None:
                on_progress(min(offset, status.st_size), status.st_size)
    if problems.count:
        raise problems.error(origin.name)
    if not number:
        raise empty_input(path)
    _refuse_duplicates(path, hashes, defaults, part, origin)
    # Shares the array's memory rather than copying it.
    places = np.frombuffer(offsets, np.int64)
    lengths = scan.found(whole=True)
    return Checked(len(offsets), lengths, status.st_size, whole.hexdigest(), status.st_mtime_ns, places)


def _request(line: bytes, defaults: Sampling, index: int) -> Request:
    return parse_request(line, defaults, default_id=default_id(index))


def _refuse_duplicates(path: Path, hashes: bytearray, defaults: Sampling, part: Slice, origin: Origin) -> None:
    values = np.frombuffer(hashes, np.dtype("<u8"))
    values.sort()  # in place, so that no second copy is needed; equal hashes are looked up by reading again
    twice = repeated(values)
    if twice.size == 0:
        return
    suspects = {int(value).to_bytes(8, "little") for value in twice[:PROBLEMS_MAX]}
    lines_of: dict[str, int] = {}
    problems = Problems(origin.unit)
    index = line_number = 0
    with open_input(path) as file:
        for block in line_blocks(file):
            for line in block.lines:
                line_number += 1
                if not line.strip():
                    continue
                index += 1
                if not part.has(index - 1):
                    continue
                custom_id = _request(line.strip(), defaults, index - 1).custom_id
                if hash_id(custom_id) not in suspects:
                    continue
                first = lines_of.setdefault(custom_id, line_number)
                if first != line_number:
                    name = msgspec.json.encode(custom_id).decode()
                    there = f"on {origin.unit} {first}"
                    problems.add(line_number, f"custom_id {name} is already {there}; give each its own")
    if problems.count:
        raise problems.error(origin.name)
