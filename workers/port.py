"""The port through which a rank speaks to an engine, whatever stands behind it.

A real engine in a child process, a null engine that answers at once and a simulated one all have this shape, so
that the worker's logic cannot tell them apart. What goes in and out are the structs of `workers.protocol`.
"""

from __future__ import annotations

from typing import Protocol

from workers.protocol import FromEngine, Job


class Engine(Protocol):
    """One engine as its rank holds it. No method but `close` ever waits."""

    def submit(self, jobs: list[Job]) -> None:
        """Hand over requests. They start in the order given, as slots become free."""
        ...

    def recall(self, recall_id: int, keys: list[int]) -> None:
        """Ask for those of `keys` back that have not started; `Returned` with this id answers."""
        ...

    def cancel(self, keys: list[int]) -> None:
        """Stop these, started or not; each still ends with an `Answer`."""
        ...

    def poll(self) -> list[FromEngine]:
        """What the engine has said since the last poll. Also moves what waits to be written."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that is readable when a poll would bring something; None if there is none (any more)."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine has ended and all that it said has been polled."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id of the engine, if it is a process."""
        ...

    def exit_reason(self) -> str:
        """How the engine ended, for people. Empty while it lives."""
        ...

    def close(self, timeout_s: float) -> None:
        """End the engine, by force after `timeout_s`. Never hangs; may be called again."""
        ...
