"""Embedding vectors as they travel and as they are written: float32, little-endian, one after the other.

Between processes they are bytes. In the record they are numbers with the eight digits, or nine, that tell one float32
from the next (half of what the same value has as a float64), or base64 of the bytes where the request asks for that.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

_LITTLE = np.dtype("<f4")
_DIGITS = (8, 9)
"""Nine significant digits tell any two float32 apart, eight nearly always do."""


def to_bytes(vectors: Vectors) -> bytes:
    return vectors.astype(_LITTLE, copy=False).tobytes()


def from_bytes(data: bytes, count: int) -> Vectors:
    """(count, dimensions) what `to_bytes` made of it. `count` must not be 0."""
    return np.frombuffer(data, _LITTLE).reshape(count, -1)


def to_base64(vector: Vectors) -> str:
    return base64.b64encode(to_bytes(vector)).decode()


def from_base64(text: str) -> Vectors:
    return np.frombuffer(base64.b64decode(text), _LITTLE)


def to_numbers(vectors: Vectors) -> list[list[float]]:
    """The same as Python floats, each one that is written with few digits and read as the same float32."""
    exact = vectors.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # 10**magnitude <= |value|, but for rounding where it is close to the next: that costs a digit, no more.
        magnitude = np.floor(np.log10(np.abs(exact)))
        best = exact
        for digits in reversed(_DIGITS):
            scale = 10.0 ** (digits - 1 - magnitude)
            short = np.rint(exact * scale) / scale
            # Not for 0 and what is not finite, whose scale is no number.
            best = np.where(short.astype(np.float32) == vectors, short, best)
    numbers: list[list[float]] = best.tolist()
    return numbers
