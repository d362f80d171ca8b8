"""What the product does in threads, done in turn on the agenda, so that it comes in the same order each time.

The record writer's thread runs its real code. Its only way to wait is a condition; here waiting unwinds the thread's
function, which is called anew when its time is up or it is notified: it keeps nothing between two waits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from tests.simulation.agenda import Agenda, ViolationError

WRITES_S = 2e-3
"""From when a thread could go on to when it does."""


class _ParkedError(BaseException):
    """A thread waits. Unwinds its function."""

    def __init__(self, condition: Condition, timeout_s: float | None) -> None:
        self.condition = condition
        self.timeout_s = timeout_s


class Condition:
    """`threading.Condition` for one waiting thread."""

    def __init__(self) -> None:
        self.waiting: Thread | None = None

    def __enter__(self) -> Condition:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody else runs meanwhile."""

    def wait(self, timeout: float | None = None) -> None:
        raise _ParkedError(self, timeout)

    def notify(self) -> None:
        if self.waiting is not None:
            thread, self.waiting = self.waiting, None
            thread.plan(0.0)


class Thread:
    """`threading.Thread` whose target is called again after each wait. `stirred` is called after each of its turns."""

    def __init__(self, agenda: Agenda, stirred: Callable[[], None], target: Callable[[], None]) -> None:
        self._agenda, self._stirred, self._target = agenda, stirred, target
        self._due_s = float("inf")
        self._ended = False

    def start(self) -> None:
        self.plan(0.0)

    def plan(self, delay_s: float) -> None:
        """Go on after so long, or earlier if that was planned."""
        at_s = self._agenda.now_s + delay_s + WRITES_S
        if at_s < self._due_s:
            self._due_s = at_s
            self._agenda.at(at_s, lambda: self._go_on(at_s))

    def _go_on(self, at_s: float) -> None:
        if at_s == self._due_s and not self._ended:
            self._run()

    def _run(self) -> None:
        self._due_s = float("inf")
        try:
            self._target()
        except _ParkedError as parked:
            parked.condition.waiting = self
            if parked.timeout_s is not None:
                self.plan(parked.timeout_s)
        else:
            self._ended = True
        self._stirred()

    def join(self) -> None:
        if not self._ended:
            self._run()
        if not self._ended:
            raise ViolationError("a thread is joined that waits for more")


class Threads:
    """In the place of the module `threading` where a thread is to be simulated."""

    def __init__(self, agenda: Agenda, stirred: Callable[[], None]) -> None:
        self._agenda, self._stirred = agenda, stirred

    def Thread(self, target: Callable[[], None], name: str, daemon: bool) -> Thread:  # noqa: N802 - threading's name
        return Thread(self._agenda, self._stirred, target)

    def Condition(self) -> Condition:  # noqa: N802 - threading's name
        return Condition()


class InTurn(Executor):
    """What is submitted is done a little later, in the order in which it came."""

    def __init__(self, agenda: Agenda, stirred: Callable[[], None]) -> None:
        self._agenda, self._stirred = agenda, stirred
        self._left: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def do() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
            self._stirred()

        self._left.append(do)
        self._agenda.after(WRITES_S, lambda: self._do(do))
        return _Waited(future, lambda: self._do(do))

    def _do(self, do: Callable[[], None]) -> None:
        if do in self._left:
            self._left.remove(do)
            do()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for do in list(self._left):
            self._do(do)


class _Waited(Future[Any]):
    """Its result is worth waiting for: that makes it."""

    def __init__(self, future: Future[Any], make: Callable[[], None]) -> None:
        self._future, self._make = future, make

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> Any:
        self._make()
        return self._future.result(0)
