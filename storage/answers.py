"""What a line of the record says, the answer included: for exports and for comparing runs.

Decoding an answer costs several times what `recordline.decode_row` does, so passes that need only times use that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from scheduling.errors import RunDirError
from scheduling.recordline import Failure, Timing
from storage.files import Disk
from storage.recovery import RECORD_NAME, ordered_lines, record_lines


class _Message(msgspec.Struct, frozen=True, gc=False):
    content: str | None = None


class _Score(msgspec.Struct, frozen=True, gc=False):
    logprob: float | None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One answer to a request. `llmpi` is there where a continuation was weighed."""

    index: int
    finish_reason: str
    text: str | None = None
    message: _Message | None = None
    llmpi: _Score | None = None

    @property
    def said(self) -> str | None:
        """The answer's text, of a completion or of a chat."""
        return self.text if self.message is None else self.message.content

    @property
    def logprob(self) -> float | None:
        return None if self.llmpi is None else self.llmpi.logprob


class Vector(msgspec.Struct, frozen=True, gc=False):
    """One embedding: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str


class _Body(msgspec.Struct, frozen=True, gc=False):
    choices: list[Choice] = []
    data: list[Vector] = []


class _Response(msgspec.Struct, frozen=True, gc=False):
    body: _Body


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A line of the record. `error` None: the request was answered."""

    custom_id: str
    llmpi: Timing
    response: _Response | None = None
    error: Failure | None = None

    @property
    def choices(self) -> list[Choice]:
        return [] if self.response is None else self.response.body.choices

    @property
    def vectors(self) -> list[Vector]:
        return [] if self.response is None else self.response.body.data


_decode = msgspec.json.Decoder(Answer).decode


def decode_answer(line: bytes) -> Answer:
    """Raises RunDirError if `line` is not a line of this version's format."""
    try:
        return _decode(line)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RunDirError(f"a line of the record is not of this version's format: {error}") from None


def answers(run_dir: Path, *, in_input_order: bool, disk: Disk | None = None) -> Iterator[Answer]:
    """All answers of a run, one at a time. Raises RunDirError: no record, or a damaged one."""
    path = run_dir / RECORD_NAME
    lines = ordered_lines(path, disk) if in_input_order else (line for _, line in record_lines(path, disk))
    for line in lines:
        yield decode_answer(line)
