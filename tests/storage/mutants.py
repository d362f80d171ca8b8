"""Files with a few faults each, made from good ones: by chance, and by somebody who knows the format.

The same seed gives the same mutants. Half of them have bits, bytes or stretches changed blindly; of the others whole
fields, pairs or tensors are changed, repeated, swapped or dropped, counts made to agree as often as not, and numbers
replaced by those at which arithmetic goes wrong.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from scheduling.errors import ModelFileError
from storage.gguf import check_gguf
from tests.storage.malformed import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Draft,
    Pair,
    Piece,
    llama_pairs,
    model,
    model_pairs,
    model_tensors,
    part,
    random_pairs,
    random_tensors,
    text,
)

LIMIT_BYTES = 1 << 20
"""A mutant's size: repeating what was repeated grows fast."""

_EDGES = [0, 1, 2, 3, 7, 8, 13, 31, 32, 33, 63, 64, 65, 255, 256, 1023, 1024, 4096, 16_384, 65_535, 131_072]
_EDGES += [(1 << bits) + more for bits in (24, 26, 30, 31, 32, 33, 59, 60, 61, 62, 63) for more in (-1, 0, 1)]
_EDGES += [(1 << 64) - 1, (1 << 64) - 32, (1 << 64) - 33]
_NUMBERS = ("version", "count", "length", "kind", "dimensions", "shape", "offset")


class Base(NamedTuple):
    """A good model: its files by name, in pieces."""

    files: dict[str, list[Piece]]


class Mutant(NamedTuple):
    """What is in each of a model's files; `changed` is the one with faults."""

    files: dict[str, bytes]
    changed: str


def bases(random: Random) -> list[Base]:
    architecture = Pair(b"general.architecture", STRING, text(b"llama"))
    loose = Pair(b"general.alignment", U32, struct.pack("<I", 1))
    tensors = model_tensors()
    single = [
        model(),
        model(version=2),
        Draft([architecture, *random_pairs(random)], random_tensors(random)),
        Draft([architecture, loose, *random_pairs(random, 10)], random_tensors(random, 8), alignment=1),
        Draft([architecture], [*tensors[:1]]),
        Draft(llama_pairs(), tensors),
    ]
    halves = [part(0, 2, tensors[:2], 4), part(1, 2, tensors[2:], 4)]
    split = {f"m-{number:05d}-of-00002.gguf": half.pieces() for number, half in enumerate(halves, 1)}
    return [*(Base({"m.gguf": draft.pieces()}) for draft in single), Base(split)]


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    random = Random(seed)
    models = bases(random)
    for _ in range(count):
        base = random.choice(models)
        changed = random.choice(list(base.files))
        files = {name: _joined(pieces) for name, pieces in base.files.items()}
        if random.random() < 0.5:
            content = files[changed]
            for _ in range(random.choice((1, 1, 2, 4, 8))):
                content = _blind(random, content)[:LIMIT_BYTES]
        else:
            pieces = base.files[changed]
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                pieces = random.choice(_KNOWING)(random, list(pieces))
            content = _joined(pieces)[:LIMIT_BYTES]
        files[changed] = content
        yield Mutant(files, changed)


def verdict(folder: Path, mutant: Mutant) -> str | None:
    """Why a mutant, which is written to `folder`, is refused; None if it is accepted.

    Raises what is neither: AssertionError for a refusal that does not say which file in one printable line.
    """
    for name, content in mutant.files.items():
        # Some file systems make whoever writes over a file wait for the disk.
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    first = folder / next(iter(mutant.files))
    try:
        check_gguf(first)
    except ModelFileError as error:
        said = str(error)
        assert any(str(folder / name) in said for name in mutant.files), said
        assert said.isprintable(), said
        assert len(said) < 1000, said
        return said.replace(str(folder) + "/", "")
    return None


def reason(said: str) -> str:
    """A refusal without what differs from file to file."""
    said = re.sub(r"^(the model )?m(-\d+-of-\d+)?\.gguf (and its other parts )?", "", said)
    said = re.sub(r"near byte \d+", "at N", said)
    said = re.sub(r"'(\\.|[^'])*'|\"[^\"]*\"", "X", said)
    said = re.sub(r"\b(general|llama|tokenizer|split)\.(?!cpp)[a-z_.]*[a-z]", "X", said)
    said = re.sub(r"of the type \w+,", "of the type N,", said)
    said = re.sub(r"(?<![-\w])-?\d+", "N", said)
    return re.sub(r"\(N[N, ]*\)", "(N)", said)


def _joined(pieces: list[Piece]) -> bytes:
    return b"".join(piece.content for piece in pieces)


# ---------------------------------------------------------------- blind


def _blind(random: Random, content: bytes) -> bytes:
    # Most of what can be wrong is in front of the weights.
    at = random.randrange(min(len(content), random.choice((24, 200, 800, 1500, 1500, 1500, LIMIT_BYTES))) or 1)
    head, tail = content[:at], content[at:]
    way = random.randrange(7)
    if way == 0:
        return head + bytes([tail[0] ^ 1 << random.randrange(8)]) + tail[1:] if tail else content
    if way == 1:
        return head + random.randbytes(1) + tail[1:]
    if way == 2:
        return head
    if way == 3:
        return head + random.randbytes(random.choice((1, 4, 8, 300))) + tail
    if way == 4:
        return head + tail[random.choice((1, 4, 8, 100)) :]
    if way == 5:
        return head + tail[: random.choice((1, 4, 8, 64, 500))] + tail
    return head + _packed(random.choice(_EDGES), random.choice((4, 8))) + tail[8:]


def _packed(number: int, size: int) -> bytes:
    return (number % (1 << 8 * size)).to_bytes(size, "little")


# ---------------------------------------------------------------- with knowledge of the format


def _change_number(random: Random, pieces: list[Piece]) -> list[Piece]:
    at = random.choice([at for at, piece in enumerate(pieces) if piece.role in _NUMBERS])
    old = int.from_bytes(pieces[at].content, "little")
    number = random.choice([random.choice(_EDGES), old + 1, old - 1, old * 2, random.randrange(64)])
    pieces[at] = pieces[at]._replace(content=_packed(number, len(pieces[at].content)))
    return pieces


def _change_bytes(random: Random, pieces: list[Piece]) -> list[Piece]:
    at = random.randrange(len(pieces))
    length = random.choice((len(pieces[at].content), random.randrange(70)))
    pieces[at] = pieces[at]._replace(content=random.randbytes(length))
    return pieces


def _swap(random: Random, pieces: list[Piece]) -> list[Piece]:
    a, b = random.randrange(len(pieces)), random.randrange(len(pieces))
    pieces[a], pieces[b] = pieces[b], pieces[a]
    return pieces


def _repeat(random: Random, pieces: list[Piece]) -> list[Piece]:
    at = random.randrange(len(pieces))
    return pieces[:at] + pieces[at : at + 1] * random.choice((2, 2, 3, 100)) + pieces[at + 1 :]


def _drop(random: Random, pieces: list[Piece]) -> list[Piece]:
    del pieces[random.randrange(len(pieces))]
    return pieces


def _swap_contents(random: Random, pieces: list[Piece]) -> list[Piece]:
    """Two fields of the same role: a key gets another's value, a tensor another's offset."""
    a = random.randrange(len(pieces))
    b = random.choice([at for at, piece in enumerate(pieces) if piece.role == pieces[a].role])
    pieces[a], pieces[b] = (
        pieces[a]._replace(content=pieces[b].content),
        pieces[b]._replace(content=pieces[a].content),
    )
    return pieces


def _owners(random: Random, pieces: list[Piece]) -> list[Piece]:
    """A whole pair or tensor is repeated, dropped or moved; the counts follow, or do not."""
    owners = list(dict.fromkeys(piece.owner for piece in pieces if piece.owner))
    if not owners:
        return pieces
    owner = random.choice(owners)
    own = [piece for piece in pieces if piece.owner == owner]
    rest = [piece for piece in pieces if piece.owner != owner]
    times = random.choice((0, 1, 2))
    places = [at for at, piece in enumerate(rest) if piece.role in ("length", "padding")] or [len(rest)]
    for _ in range(times):
        at = random.choice(places)
        rest[at:at] = own
    return _counted(rest, owner, times - 1) if random.random() < 0.7 else rest


def _new_pair(random: Random, pieces: list[Piece]) -> list[Piece]:
    """A key that means something, with a value of any type."""
    wanted = [pair.key for pair in model_pairs()]
    wanted += [b"split.no", b"split.count", b"split.tensors.count", b"general.type", b"llama.vocab_size"]
    key = random.choice([*wanted, b"llama.attention.key_length", b"llama.rope.\xff", b""])
    kind = random.choice((U8, U16, U32, I32, F32, BOOL, U64, STRING, ARRAY))
    value = random.choice([random.randbytes(8), text(random.randbytes(9)), random.choice(model_pairs()).value])
    pair = Draft([Pair(key, kind, value)]).pieces()[4:-2]
    at = random.choice([at for at, piece in enumerate(pieces) if piece.owner.startswith("pair")] or [len(pieces)])
    pieces[at:at] = pair
    return _counted(pieces, "pair", 1)


def _counted(pieces: list[Piece], owner: str, more: int) -> list[Piece]:
    """With `more` pairs or tensors in their count."""
    counts = [at for at, piece in enumerate(pieces) if piece.role == "count"]
    which = 1 if owner.startswith("pair") else 0
    if which < len(counts):
        at = counts[which]
        number = int.from_bytes(pieces[at].content, "little") + more
        pieces[at] = pieces[at]._replace(content=_packed(number, 8))
    return pieces


_KNOWING = (
    _change_number,
    _change_number,
    _change_bytes,
    _swap,
    _repeat,
    _drop,
    _swap_contents,
    _owners,
    _owners,
    _new_pair,
)
