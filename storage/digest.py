"""What names a blob: the SHA-256 of its bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from scheduling.errors import ModelStoreError

ALGORITHM = "sha256"
_TEXT = re.compile(rf"{ALGORITHM}:([0-9a-f]{{64}})", re.ASCII)


@dataclass(frozen=True, order=True)
class Digest:
    """A SHA-256 in hexadecimal. Made by `parse` or `of` alone, so one that exists is well-formed."""

    hex: str

    def __post_init__(self) -> None:
        if not isinstance(self.hex, str) or _TEXT.fullmatch(f"{ALGORITHM}:{self.hex}") is None:
            raise ModelStoreError(
                f"{ALGORITHM}:{self.hex!s:.80} is no digest: it has to be {ALGORITHM}: and 64 digits, 0-9 and a-f"
            )

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Of 'sha256:<64 digits>'. Raises ModelStoreError for anything else."""
        if not isinstance(text, str) or _TEXT.fullmatch(text) is None:
            raise ModelStoreError(
                f"{text!r:.100} is no digest: it has to be {ALGORITHM}: and 64 digits, 0-9 and a-f in lower case"
            )
        return cls(text[len(ALGORITHM) + 1 :])

    @classmethod
    def of(cls, hashed: Any) -> Digest:
        """Of a hash object that has seen all bytes."""
        return cls(hashed.hexdigest())

    def __str__(self) -> str:
        return f"{ALGORITHM}:{self.hex}"

    @property
    def short(self) -> str:
        """For tables."""
        return self.hex[:12]

    @property
    def file_name(self) -> str:
        """Of the blob, in the folder of blobs."""
        return f"{ALGORITHM}-{self.hex}"


def is_digest(text: str) -> bool:
    """Whether `text` is meant as a digest, well-formed or not."""
    return text.startswith(f"{ALGORITHM}:")
