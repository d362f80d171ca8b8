"""GGUF files of every kind that must be accepted or refused, each made from a number.

`Draft` is a file piece by piece, with claims that may differ from what is there. `CASES` has, by name, how to make a
file of a kind, what its refusal says, and where we refuse more than ggml does, why. The names of the first group are
those of the kinds that llama.cpp's own test of its reader makes; the others are what else has gone wrong or could.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

from storage.ggmltypes import REMOVED_TYPES, TENSOR_TYPES

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
Q4_0, Q8_0, I8, I64 = 2, 8, 24, 27
F32_TENSOR = 0
HUGE = (1 << 64) - 1


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def texts(*values: bytes) -> bytes:
    """An array's value: its type, its length, its strings."""
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


def numbers(kind: int, *values: float) -> bytes:
    """An array's value: its type, its length, its numbers."""
    return struct.pack(f"<IQ{len(values)}{CODES[kind]}", kind, len(values), *values)


@dataclass
class Pair:
    """`value` in bytes, an array's with its type and length. `key_claim`: the key's length, if it is to be a lie."""

    key: bytes
    kind: int
    value: bytes
    key_claim: int | None = None


@dataclass
class Tensor:
    """`offset`, `name_claim` and `dimensions` are worked out where they are None."""

    name: bytes
    shape: tuple[int, ...]
    kind: int = F32_TENSOR
    offset: int | None = None
    name_claim: int | None = None
    dimensions: int | None = None

    @property
    def size(self) -> int:
        values = 1
        for length in self.shape:
            values *= max(length, 0)
        per_block, block_bytes = TENSOR_TYPES.get(self.kind, (1, 4))
        return values // per_block * block_bytes


class Piece(NamedTuple):
    """One field of a file. `role` says what it is, `owner` which pair or tensor it belongs to."""

    role: str
    content: bytes
    owner: str = ""


@dataclass
class Draft:
    """A file before it is bytes. `alignment` is what offsets and padding go by, whatever the pairs say."""

    pairs: list[Pair] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    tensors_claim: int | None = None
    pairs_claim: int | None = None
    alignment: int = 32
    data_bytes: int | None = None
    """What the tensors need with their padding, up to 64 KiB, if None."""

    def pieces(self) -> list[Piece]:
        pairs = len(self.pairs) if self.pairs_claim is None else self.pairs_claim
        tensors = len(self.tensors) if self.tensors_claim is None else self.tensors_claim
        found = [Piece("magic", self.magic), Piece("version", struct.pack("<I", self.version))]
        found += [Piece("count", struct.pack("<Q", tensors)), Piece("count", struct.pack("<Q", pairs))]
        for number, pair in enumerate(self.pairs):
            owner = f"pair {number}"
            claim = len(pair.key) if pair.key_claim is None else pair.key_claim
            found += [Piece("length", struct.pack("<Q", claim), owner), Piece("key", pair.key, owner)]
            found += [Piece("kind", struct.pack("<I", pair.kind), owner), *_value_pieces(pair, owner)]
        place = 0
        for number, tensor in enumerate(self.tensors):
            found += _tensor_pieces(tensor, f"tensor {number}", place)
            place = _padded(place + tensor.size, self.alignment)
        size = sum(len(piece.content) for piece in found)
        found.append(Piece("padding", bytes(_padded(size, self.alignment) - size)))
        data_bytes = min(place, 1 << 16) if self.data_bytes is None else self.data_bytes
        found.append(Piece("data", (bytes(range(256)) * (data_bytes // 256 + 1))[:data_bytes]))
        return found

    def build(self) -> bytes:
        return b"".join(piece.content for piece in self.pieces())


def _value_pieces(pair: Pair, owner: str) -> list[Piece]:
    """The value cut up where a reader reads numbers: a length, an array's type and length."""
    cuts = {STRING: [("length", 8)], ARRAY: [("kind", 4), ("length", 8)]}.get(pair.kind, [])
    if pair.kind == ARRAY and pair.value[:4] == struct.pack("<I", STRING):
        cuts.append(("length", 8))
    found, at = [], 0
    for role, length in cuts:
        found.append(Piece(role, pair.value[at : at + length], owner))
        at += length
    return [*found, Piece("value", pair.value[at:], owner)]


def _tensor_pieces(tensor: Tensor, owner: str, place: int) -> list[Piece]:
    claim = len(tensor.name) if tensor.name_claim is None else tensor.name_claim
    dimensions = len(tensor.shape) if tensor.dimensions is None else tensor.dimensions
    return [
        Piece("length", struct.pack("<Q", claim), owner),
        Piece("name", tensor.name, owner),
        Piece("dimensions", struct.pack("<I", dimensions), owner),
        *(Piece("shape", struct.pack("<q", length), owner) for length in tensor.shape),
        Piece("kind", struct.pack("<I", tensor.kind), owner),
        Piece("offset", struct.pack("<Q", place if tensor.offset is None else tensor.offset), owner),
    ]


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment


# ---------------------------------------------------------------- files that are as they should be


def random_pairs(random: Random, count: int = 40) -> list[Pair]:
    """Pairs of all types, with values of all bits: bools other than 0 and 1, NaN, texts that are not UTF-8."""
    pairs = []
    for number in range(count):
        kind = random.choice([*CODES, STRING, ARRAY])
        element = random.choice([*CODES, STRING])
        if kind == STRING:
            value = text(random.randbytes(random.randrange(64)))
        elif kind != ARRAY:
            value = random.randbytes(struct.calcsize(CODES[kind]))
        elif element == STRING:
            value = texts(*(random.randbytes(random.randrange(5)) for _ in range(random.randrange(17))))
        else:
            length = random.randrange(16)
            value = struct.pack("<IQ", element, length) + random.randbytes(length * struct.calcsize(CODES[element]))
        pairs.append(Pair(b"my_key_%d" % number, kind, value))
    return pairs


def random_tensors(random: Random, count: int = 20) -> list[Tensor]:
    """Small tensors of all types and numbers of dimensions."""
    tensors = []
    for number in range(count):
        kind = random.choice(list(TENSOR_TYPES))
        shape = [TENSOR_TYPES[kind][0] * random.randrange(1, 4)]
        shape += [random.randrange(1, 5) for _ in range(random.randrange(4))]
        tensors.append(Tensor(b"my_tensor_%d" % number, tuple(shape), kind))
    return tensors


def model_pairs() -> list[Pair]:
    """What a model says of itself, with every kind of value that is read."""
    number = struct.Struct("<I").pack
    return [
        Pair(b"general.architecture", STRING, text(b"llama")),
        Pair(b"general.name", STRING, text(b"Tiny")),
        Pair(b"general.license", STRING, text(b"mit")),
        Pair(b"general.file_type", U32, number(15)),
        Pair(b"general.alignment", U32, number(32)),
        Pair(b"llama.context_length", U32, number(512)),
        Pair(b"llama.embedding_length", U32, number(64)),
        Pair(b"llama.block_count", U32, number(2)),
        Pair(b"llama.attention.head_count", U32, number(4)),
        Pair(b"llama.attention.head_count_kv", ARRAY, numbers(I32, 2, 1)),
        Pair(b"tokenizer.ggml.model", STRING, text(b"gpt2")),
        Pair(b"tokenizer.ggml.tokens", ARRAY, texts(b"a", b"b", b"\xc3\xa9", b"\xff")),
        Pair(b"tokenizer.ggml.scores", ARRAY, numbers(F32, 0, 1, 2, 3)),
        Pair(b"tokenizer.ggml.token_type", ARRAY, numbers(I32, 1, 1, 1, 6)),
        Pair(b"tokenizer.ggml.add_bos_token", BOOL, b"\1"),
        Pair(b"tokenizer.chat_template", STRING, text(b"{{ messages }}" * 100)),
    ]


def llama_pairs() -> list[Pair]:
    """What llama.cpp needs to load a model's vocabulary: one of bytes and four words."""
    number = struct.Struct("<I").pack
    tokens = [
        b"<unk>",
        b"<s>",
        b"</s>",
        *(b"<0x%02X>" % byte for byte in range(256)),
        b"\xe2\x96\x81",
        b"a",
        b"b",
        b"ab",
    ]
    types = (2, 3, 3, *([6] * 256), 1, 1, 1, 1)
    return [
        *(pair for pair in model_pairs() if not pair.key.startswith(b"tokenizer.")),
        Pair(b"llama.feed_forward_length", U32, number(128)),
        Pair(b"llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        Pair(b"llama.rope.dimension_count", U32, number(16)),
        Pair(b"tokenizer.ggml.model", STRING, text(b"llama")),
        Pair(b"tokenizer.ggml.tokens", ARRAY, texts(*tokens)),
        Pair(b"tokenizer.ggml.scores", ARRAY, numbers(F32, *range(len(tokens)))),
        Pair(b"tokenizer.ggml.token_type", ARRAY, numbers(I32, *types)),
        Pair(b"tokenizer.ggml.bos_token_id", U32, number(1)),
        Pair(b"tokenizer.ggml.eos_token_id", U32, number(2)),
        Pair(b"tokenizer.ggml.unknown_token_id", U32, number(0)),
        Pair(b"tokenizer.ggml.add_bos_token", BOOL, b"\1"),
    ]


def model_tensors() -> list[Tensor]:
    return [
        Tensor(b"token_embd.weight", (64, 4), Q8_0),
        Tensor(b"blk.0.attn_q.weight", (64, 3), Q4_0),
        Tensor(b"blk.1.attn_q.weight", (64, 3), F32_TENSOR),
        Tensor(b"output_norm.weight", (64,), F32_TENSOR),
    ]


def model(**changes: object) -> Draft:
    return replace(Draft(model_pairs(), model_tensors()), **changes)  # type: ignore[arg-type]


def part(number: int, count: int, tensors: list[Tensor], total: int, *more: Pair, whole: bool = False) -> Draft:
    """A part of a split model: the first with the model's own keys, the others, unless `whole`, without."""
    keys = [
        Pair(b"split.no", U16, struct.pack("<H", number)),
        Pair(b"split.count", U16, struct.pack("<H", count)),
        Pair(b"split.tensors.count", I32, struct.pack("<i", total)),
    ]
    given = {pair.key for pair in more}
    own = model_pairs() if whole or number == 0 else []
    return Draft([*own, *(pair for pair in keys if pair.key not in given), *more], tensors)


# ---------------------------------------------------------------- the kinds


class Case(NamedTuple):
    """`refused`: part of what is said; None if such a file is fine. `stricter`: why, where ggml accepts it."""

    make: Callable[[Random], Draft]
    refused: str | None = None
    stricter: str | None = None


def _header(**changes: object) -> Callable[[Random], Draft]:
    return lambda random: replace(Draft(data_bytes=64), **changes)  # type: ignore[arg-type]


def _with_pair(pair: Pair) -> Callable[[Random], Draft]:
    return lambda random: Draft([*random_pairs(random), pair], data_bytes=64)


def _pairs(change: Callable[[list[Pair]], list[Pair]]) -> Callable[[Random], Draft]:
    return lambda random: Draft(change(random_pairs(random)), data_bytes=256)


def _with_tensor(tensor: Tensor, **changes: object) -> Callable[[Random], Draft]:
    def make(random: Random) -> Draft:
        draft = Draft(random_pairs(random), [*random_tensors(random), tensor])
        return replace(draft, **changes)  # type: ignore[arg-type]

    return make


def _aligned(alignment: int, said: int | None, **changes: object) -> Callable[[Random], Draft]:
    """Laid out by `alignment`, with a general.alignment of `said`."""

    def make(random: Random) -> Draft:
        pairs = random_pairs(random)
        if said is not None:
            pairs.append(Pair(b"general.alignment", U32, struct.pack("<I", said)))
        # Sizes of which none is a multiple of what they are aligned to.
        tensors = [*random_tensors(random), Tensor(b"odd", (3,), I8), Tensor(b"last", (5,), I8)]
        return replace(Draft(pairs, tensors, alignment=alignment), **changes)  # type: ignore[arg-type]

    return make


def _alignment(kind: int, value: bytes) -> Callable[[Random], Draft]:
    return lambda random: Draft(
        [*random_pairs(random), Pair(b"general.alignment", kind, value)], [Tensor(b"t", (8,))], data_bytes=64
    )


def _claimed_array(element: int, length: int) -> Callable[[Random], Draft]:
    return _with_pair(Pair(b"claims", ARRAY, struct.pack("<IQ", element, length)))


def _data(tensors: list[Tensor], data_bytes: int | None = None) -> Callable[[Random], Draft]:
    return lambda random: Draft(random_pairs(random), tensors, data_bytes=data_bytes)


def _nothing(random: Random) -> Draft:
    return Draft(random_pairs(random), random_tensors(random), data_bytes=0)


_LOADER = "ggml reads only the header; llama.cpp's loader refuses what lies beyond the end of the file"
_LIMITS = "bounds time and memory; no model comes near it"

KINDS_OF_LLAMA_CPP: dict[str, Case] = {
    "HEADER_BAD_MAGIC": Case(_header(magic=b"FUGG"), "does not begin with 'GGUF'"),
    "HEADER_BAD_VERSION_0": Case(_header(version=0), "GGUF version 0"),
    "HEADER_BAD_VERSION_1": Case(_header(version=1), "GGUF version 1"),
    "HEADER_BAD_VERSION_FUTURE": Case(_header(version=4), "GGUF version 4"),
    "HEADER_BAD_N_TENSORS": Case(_header(tensors_claim=HUGE), f"claims {HUGE} tensors"),
    "HEADER_BAD_N_KV": Case(_header(pairs_claim=HUGE), f"{HUGE} keys"),
    "HEADER_EMPTY": Case(_header()),
    "KV_BAD_KEY_SIZE": Case(_pairs(lambda pairs: [replace(pairs[0], key_claim=HUGE), *pairs[1:]]), "a key of"),
    "KV_EMPTY_KEY": Case(_pairs(lambda pairs: [*pairs, Pair(b"", U8, b"\1")]), "is empty"),
    "KV_BAD_TYPE": Case(_with_pair(Pair(b"odd", 13, b"\0" * 8)), "the key 'odd' has the unknown type 13"),
    "KV_DUPLICATE_KEY": Case(_pairs(lambda pairs: pairs + pairs[7:8]), "the key 'my_key_7' is there twice"),
    "KV_BAD_ALIGN": Case(_alignment(U32, struct.pack("<I", 13)), "an alignment of 13"),
    "KV_WRONG_TYPE_ALIGN": Case(_alignment(I32, struct.pack("<i", 32)), "general.alignment is not"),
    "KV_SUCCESS": Case(_pairs(lambda pairs: pairs)),
    "TENSORS_BAD_NAME_SIZE": Case(_with_tensor(Tensor(b"n" * 64, (1,))), "the name of a tensor of 64 bytes"),
    "TENSORS_BAD_N_DIMS": Case(_with_tensor(Tensor(b"t", (1,) * 4, dimensions=5)), "'t' has 5 dimensions"),
    "TENSORS_BAD_SHAPE": Case(_with_tensor(Tensor(b"t", (-1, -1))), "'t' has the shape (-1, -1)"),
    "TENSORS_ZERO_DIM": Case(_with_tensor(Tensor(b"t", (32, 0)))),
    "TENSORS_NE_TOO_BIG": Case(_with_tensor(Tensor(b"t", (1 << 33, 1 << 33))), "'t' has the shape"),
    "TENSORS_NBYTES_TOO_BIG": Case(_with_tensor(Tensor(b"t", (1 << 31, 1 << 31), I64)), "needs 36893488147419103232"),
    "TENSORS_NBYTES_PAD_WRAP": Case(
        _with_tensor(Tensor(b"t", (4, (1 << 30) - 1, (1 << 30) + 1))), "needs 18446744073709551600"
    ),
    "TENSORS_BAD_TYPE": Case(_with_tensor(Tensor(b"t", (1,), 43)), "'t' is of the type 43"),
    "TENSORS_BAD_OFFSET": Case(_with_tensor(Tensor(b"t", (1,), offset=HUGE)), f"begins at {HUGE}"),
    "TENSORS_DUPLICATE_NAME": Case(_with_tensor(Tensor(b"my_tensor_3", (1,))), "'my_tensor_3' is there twice"),
    "TENSORS_BAD_ALIGN": Case(_aligned(32, 13), "an alignment of 13"),
    "TENSORS_INCONSISTENT_ALIGN": Case(_aligned(1, None), "not aligned to 32"),
    "TENSORS_SUCCESS": Case(_aligned(32, None)),
    "TENSORS_CUSTOM_ALIGN": Case(_aligned(1, 1)),
    "DATA_NOT_ENOUGH_DATA": Case(_data([Tensor(b"t", (8, 8))], 255), "end at byte", _LOADER),
    "DATA_BAD_ALIGN": Case(_aligned(1, 13), "an alignment of 13"),
    "DATA_INCONSISTENT_ALIGN": Case(_aligned(8, 32), "not aligned to 32"),
    "DATA_MEM_SIZE_OVERFLOW": Case(
        _data([Tensor(b"a", ((1 << 63) - 64,), I8), Tensor(b"b", ((1 << 63) - 64,), I8)], 32), "end at byte", _LOADER
    ),
    "DATA_SUCCESS": Case(lambda random: Draft(random_pairs(random), random_tensors(random))),
    "DATA_CUSTOM_ALIGN": Case(_aligned(64, 64)),
}

OTHER_KINDS: dict[str, Case] = {
    "a whole model": Case(lambda random: model()),
    "version 2": Case(lambda random: model(version=2)),
    "the other byte order": Case(_header(version=3 << 24), "big-endian"),
    "2^60 tensors": Case(_header(tensors_claim=1 << 60), "claims 1152921504606846976 tensors"),
    "2^60 keys": Case(_header(pairs_claim=1 << 60), "1152921504606846976 keys"),
    "more keys than are there": Case(_header(pairs_claim=400), "bytes are left"),
    "more tensors than are there": Case(_header(tensors_claim=4), "bytes are left"),
    "more tensors than any model": Case(_header(tensors_claim=131_073), "131072 and 16384 at most"),
    "a long key": Case(_with_pair(Pair(b"k" * 1025, U8, b"\1")), "a key of 1025 bytes", _LIMITS),
    "a key that is not UTF-8": Case(
        _with_pair(Pair(b"\xff\xfe", U8, b"\1")), "a key that is not UTF-8", "the format says ASCII"
    ),
    "a key with a zero byte": Case(
        _with_pair(Pair(b"a\0b", U8, b"\1")), "with a zero byte", "nobody can ask llama.cpp for it"
    ),
    "a name that is not UTF-8": Case(
        _with_tensor(Tensor(b"\xff", (1,))),
        "the name of a tensor that is not UTF-8",
        "it could not be shown or recorded",
    ),
    "a name with a zero byte": Case(
        _with_tensor(Tensor(b"a\0b", (1,))), "with a zero byte", "llama.cpp cuts it there, and names become one"
    ),
    "a text of 2^63 bytes": Case(_with_pair(Pair(b"a", STRING, struct.pack("<Q", 1 << 63))), "'a' has a string of"),
    "a text past the end": Case(_with_pair(Pair(b"a", STRING, struct.pack("<Q", 5000))), "within the key 'a'"),
    "a text that is not UTF-8": Case(_with_pair(Pair(b"general.name", STRING, text(b"\xff")))),
    "2^60 strings": Case(_claimed_array(STRING, 1 << 60), "'claims' claims 1152921504606846976 strings"),
    "2^64 - 1 numbers": Case(_claimed_array(U64, HUGE), f"'claims' claims {HUGE} numbers"),
    "strings past the end": Case(_claimed_array(STRING, 20), "bytes are left"),
    "numbers past the end": Case(_claimed_array(U64, 20), "bytes are left"),
    "a string past the end in an array": Case(
        _with_pair(Pair(b"a", ARRAY, struct.pack("<IQQ", STRING, 1, 5000))), "within the key 'a'"
    ),
    "a string of 2^63 bytes in an array": Case(
        _with_pair(Pair(b"a", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 63))), "'a' has a string of"
    ),
    "an array of arrays": Case(
        _with_pair(Pair(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) + numbers(U8, 1))), "'a' is one of arrays"
    ),
    "an array of an unknown type": Case(_claimed_array(13, 1), "elements of the unknown type 13"),
    "an empty array": Case(_with_pair(Pair(b"a", ARRAY, texts()))),
    "a bool of 2": Case(_with_pair(Pair(b"a", BOOL, b"\2"))),
    "an alignment of 0": Case(_alignment(U32, bytes(4)), "an alignment of 0"),
    "an alignment of 3": Case(_alignment(U32, struct.pack("<I", 3)), "an alignment of 3"),
    "an alignment of 2^31": Case(_alignment(U32, struct.pack("<I", 1 << 31)), "end at byte"),
    "an alignment in a text": Case(_alignment(STRING, text(b"32")), "general.alignment is not"),
    "an alignment in a long text": Case(_alignment(STRING, text(b"3" * 2000)), "general.alignment is not"),
    "an alignment in an array": Case(_alignment(ARRAY, numbers(U32, 32)), "general.alignment is not"),
    "an alignment in a bool": Case(_alignment(BOOL, b"\1"), "general.alignment is not"),
    "no dimensions": Case(_with_tensor(Tensor(b"t", ()))),
    "a nameless tensor": Case(_with_tensor(Tensor(b"", (1,)))),
    "a negative type": Case(_with_tensor(Tensor(b"t", (1,), (1 << 32) - 1)), "'t' is of the type 4294967295"),
    "half a block": Case(_with_tensor(Tensor(b"t", (48, 2), Q4_0)), "rows of 48 values in blocks of 32"),
    "half a block of no dimensions": Case(_with_tensor(Tensor(b"t", (), Q4_0)), "rows of 1 values in blocks of 32"),
    "a negative dimension behind a zero": Case(_with_tensor(Tensor(b"t", (0, -1))), "'t' has the shape (0, -1)"),
    "tensors that overlap": Case(
        _data([Tensor(b"a", (64,)), Tensor(b"b", (64,), offset=32)]), "'b' begins at 32 of the data and overlaps 'a'"
    ),
    "tensors in the same place": Case(_data([Tensor(b"a", (64,)), Tensor(b"b", (64,), offset=0)]), "overlaps 'a'"),
    "a hole between tensors": Case(
        _data([Tensor(b"a", (8,)), Tensor(b"b", (8,), offset=64)], 128), "begins at 64 of the data, and should at 32"
    ),
    "tensors in another order": Case(
        _data([Tensor(b"a", (8,), offset=32), Tensor(b"b", (8,), offset=0)], 128), "begins at 32 of the data"
    ),
    "a first tensor that is not first": Case(_data([Tensor(b"a", (8,), offset=32)], 128), "and should at 0"),
    "data past the end": Case(_data([Tensor(b"a", (64,))], 128), "(the last is 'a')", _LOADER),
    "no data at all": Case(_nothing, "end at byte", _LOADER),
    "the last padding is not there": Case(_data([Tensor(b"a", (3,))], 12)),
    "more data than is needed": Case(_data([Tensor(b"a", (8,))], 500)),
}
OTHER_KINDS |= {
    f"the removed type {name}": Case(_with_tensor(Tensor(b"t", (256,), number)), f"type {name}, which llama.cpp reads")
    for number, name in REMOVED_TYPES.items()
}

CASES = KINDS_OF_LLAMA_CPP | OTHER_KINDS
