"""A record that is kept nowhere: for jobs whose answers go straight to the caller (`Pool`, `infer`)."""

from __future__ import annotations


class MemoryRecord:
    """`coordinator.loop.Recorder` that acknowledges at once. Keeps no line: the loop hands them on."""

    def __init__(self) -> None:
        self._fresh = 0

    @property
    def backlog_bytes(self) -> int:
        """Nothing waits here."""
        return 0

    def append(self, lines: list[bytes]) -> None:
        self._fresh += len(lines)

    def acknowledged(self) -> int:
        fresh, self._fresh = self._fresh, 0
        return fresh
