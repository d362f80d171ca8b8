"""A worker's engine seen from outside: started, watched, killed when it hangs, started again or not.

`workers.care` has the rules; here they are held against the one engine that a worker has. What becomes of the
requests is the worker's business: it is told that the engine is `Down`, tells rank 0, and closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduling.errors import LlmpiError, UserError
from scheduling.messages import Placement
from workers.care import Lease, Restarts, gpu_is_gone, out_of_memory
from workers.gpuhealth import GpuHealth
from workers.port import Engine
from workers.protocol import EngineFailed, FromEngine, Stats


@dataclass(frozen=True, slots=True)
class Down:
    """An engine is of no more use. `wait_s`: until the next one is started; None: there is none.

    `close_s`: how long it may take to end.
    """

    reason: str
    wait_s: float | None = None
    user_error: bool = False
    close_s: float = 1.0


class Keeper:
    """Of one worker's engine: `engine` is None where there is none, `loaded` False while it loads.

    `placement` and `health`, which knows of the GPUs when an engine has died, are set before the first start.
    """

    def __init__(self, factory: Callable[[Placement], Engine], lease_s: float, clock: Callable[[], float]) -> None:
        self.engine: Engine | None = None
        self.loaded = False
        self.placement = Placement()
        self.health: GpuHealth | None = None
        self._factory = factory
        self._clock = clock
        self._lease = Lease(lease_s, clock())
        self._stalled = False
        """One of the engine's contexts has had work for a lease and made no step, while others did."""
        self._restarts = Restarts()
        self._restart_at: float | None = None

    # ------------------------------------------------------------ to its life

    def start(self) -> Down | None:
        """Start an engine. What it is, where it cannot be started."""
        self.loaded = False
        self._restart_at = None
        self._stalled = False
        self._lease.start(self._clock())
        try:
            self.engine = self._factory(self.placement)
        except (LlmpiError, OSError) as error:
            return Down(f"the engine cannot be started: {error}", user_error=isinstance(error, UserError))
        return None

    def start_again(self, at: float) -> None:
        """To be called when one is down: the next one starts at that time."""
        self._restart_at = at

    def close(self, timeout_s: float) -> list[FromEngine]:
        """End the engine, if there is one. Returns what it still said."""
        engine, self.engine = self.engine, None
        self.loaded = False
        if engine is None:
            return []
        engine.close(timeout_s)
        return engine.poll()

    def leave(self) -> None:
        """No other one will be started."""
        self._restart_at = None

    # ------------------------------------------------------------ what is known of it

    def on_loaded(self, now: float) -> None:
        self.loaded = True
        self._restarts.loaded(now)

    def on_answered(self) -> None:
        """A request has ended in it, well or not."""
        self._restarts.answered()

    def on_stats(self, stats: Stats) -> None:
        self._stalled = stats.stalled_s > self._lease.lease_s

    def on_failed(self, failed: EngineFailed) -> Down:
        """It says itself that it cannot go on."""
        if self.loaded and not failed.user_error:
            return self._died(failed.reason)
        # It cannot be loaded: trying the same again would fail the same way.
        return Down(self._with_free_memory(failed.reason), user_error=failed.user_error)

    def look(self, now: float, *, heard: bool, working: bool) -> Down | None:
        """A turn of the worker: starts an engine if that is due, and says if the one there is has died or hangs.

        `heard`: it said something in this turn. `working`: it has requests.
        """
        down = self.start() if self._restart_at is not None and now >= self._restart_at else None
        engine, loading = self.engine, not self.loaded
        over = self._lease.turn(
            now, heard=heard, loading=engine is not None and loading, working=engine is not None and working
        )
        if engine is None:
            return down
        if not engine.alive:
            return self._died(engine.exit_reason())
        if over or self._stalled:
            return self._died(self._lease.story(loading), hangs=True)
        return None

    def _died(self, reason: str, hangs: bool = False) -> Down:
        """Another one is started, unless that is of no use, or was tried too often."""
        close_s = 0.0 if hangs else 1.0
        trouble = self.health.trouble() if self.health is not None else ""
        if trouble:
            return Down(f"{reason}; {trouble}", close_s=close_s)
        if gpu_is_gone(reason):
            return Down(reason, close_s=close_s)
        if out_of_memory(reason):
            advice = "use fewer --slots, a smaller --ctx or fewer --gpu-layers"
            return Down(f"{self._with_free_memory(reason)}; {advice}", close_s=close_s)
        wait_s = self._restarts.died(self._clock())
        if wait_s is None:
            reason = f"{reason}; {self._restarts.deaths} of its engines have died, with too little done in between"
        return Down(reason, wait_s, close_s=close_s)

    def _with_free_memory(self, reason: str) -> str:
        free = self.health.free() if self.health is not None and out_of_memory(reason) else ""
        return f"{reason} ({free})" if free else reason
