"""What is left to do when a command has said its last word: to be called once, right before the process ends.

Whoever starts something that must not be left to the end of the interpreter registers what ends it.
"""

from __future__ import annotations

from collections.abc import Callable

_last: list[Callable[[int], int]] = []


def at_last(end: Callable[[int], int]) -> None:
    """Have `end` called with the exit status; it returns the status, or ends the process with it."""
    _last.append(end)


def leave(code: int) -> int:
    """Call what was registered, the last one first. Returns the exit status."""
    while _last:
        code = _last.pop()(code)
    return code
