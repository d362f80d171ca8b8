"""What every reader of HDF5 takes: MATLAB's `h5read`, `h5readatt` and `h5disp`, R's rhdf5, h5dump since HDF5 1.8.

That is: a file in the oldest format; hard links alone; chunked datasets whose filters are built into HDF5; standard
integers and floats, texts, and flat compounds of them; no enumerations (which h5py makes of truth values), references,
opaque bytes, or dataspaces without extent. Texts of variable length in attributes alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
from h5py import h5d, h5s, h5t, h5z

FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}
NUMBERS = (
    h5t.STD_I8LE, h5t.STD_I16LE, h5t.STD_I32LE, h5t.STD_I64LE, h5t.STD_U8LE, h5t.STD_U16LE, h5t.STD_U32LE,
    h5t.STD_U64LE, h5t.IEEE_F32LE, h5t.IEEE_F64LE,
)  # fmt: skip
ATTRIBUTE_BYTES_MAX = 64_000
"""Larger ones need a newer format of the file."""


def check_any_reader_takes(path: Path) -> list[str]:
    """Names of all that was looked at: datasets, and attributes as 'dataset@attribute'."""
    with h5py.File(path, "r", locking=False) as file:
        assert file.id.get_create_plist().get_version()[0] == 0, "the superblock is not of the oldest version"
        assert file.userblock_size == 0
        return _look(file, "")


def _look(item: Any, name: str) -> list[str]:
    seen = []
    for key in item.attrs:
        attribute = item.attrs.get_id(key)
        seen.append(f"{name}@{key}")
        assert attribute.get_space().get_simple_extent_type() in (h5s.SCALAR, h5s.SIMPLE), seen[-1]
        assert attribute.dtype.itemsize * math.prod(attribute.shape) < ATTRIBUTE_BYTES_MAX, seen[-1]
        _check_type(attribute.get_type(), seen[-1], variable_texts=True)
    if isinstance(item, h5py.Dataset):
        seen.append(name)
        assert item.id.get_space().get_simple_extent_type() == h5s.SIMPLE, name
        made = item.id.get_create_plist()
        assert made.get_layout() == h5d.CHUNKED, name
        filters = [made.get_filter(number)[0] for number in range(made.get_nfilters())]
        assert set(filters) <= FILTERS, (name, filters)
        _check_type(item.id.get_type(), name, variable_texts=False)
        return seen
    for key in item:
        assert isinstance(item.get(key, getlink=True), h5py.HardLink), f"{name}/{key}"
        seen += _look(item[key], f"{name}/{key}")
    return seen


def _check_type(kind: Any, name: str, *, variable_texts: bool, inside: bool = False) -> None:
    if kind.get_class() == h5t.STRING:
        assert variable_texts or not kind.is_variable_str(), f"{name} is of no fixed length"
        assert kind.get_cset() in (h5t.CSET_ASCII, h5t.CSET_UTF8), name
    elif kind.get_class() == h5t.COMPOUND:
        assert not inside, f"{name} has a compound in a compound"
        for number in range(kind.get_nmembers()):
            field = f"{name}.{kind.get_member_name(number).decode()}"
            _check_type(kind.get_member_type(number), field, variable_texts=False, inside=True)
    else:
        assert any(kind.equal(number) for number in NUMBERS), f"{name} is of {kind}"
