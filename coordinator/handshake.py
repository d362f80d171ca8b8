"""The first exchange: who is here, do all belong to this job, and what may each of them use.

Every worker rank sends `Hello`. Once all have, rank 0 compares them with its own, plans the placements from all hosts
and answers `Welcome` or `Refuse`. One odd rank refuses the whole job, by name: half a job on other settings would be
worse than none.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduling.errors import HandshakeError, ProtocolError, RankLostError
from scheduling.link import Hub
from scheduling.messages import Heartbeat, Hello, Refuse


class Handshake:
    """Collects the hellos of `hub.workers`. `patience_s` bounds the wait for the last of them."""

    def __init__(self, hub: Hub, own: Hello, clock: Callable[[], float], patience_s: float = 120.0) -> None:
        self._hub = hub
        self._own = own
        self._clock = clock
        self._deadline = clock() + patience_s
        self._patience_s = patience_s
        self.hellos: dict[int, Hello] = {}

    def step(self) -> bool:
        """One turn. True once every rank has said hello and belongs here.

        Raises:
            HandshakeError: a rank does not belong; all have been told.
            RankLostError: a rank has not said anything in time, or has died.
        """
        for worker, message in self._hub.poll():
            if isinstance(message, Hello):
                self.hellos[worker] = message
            elif not isinstance(message, Heartbeat):
                raise ProtocolError(f"rank {worker} sent {type(message).__name__} before the handshake was over")
        if dead := self._hub.take_lost():
            raise RankLostError(
                f"rank {', '.join(map(str, dead))} died before the job had begun: look at its host, and at what it said"
            )
        missing = [worker for worker in self._hub.workers if worker not in self.hellos]
        if missing:
            if self._clock() > self._deadline:
                raise RankLostError(
                    f"rank {', '.join(map(str, missing))} did not start within {self._patience_s:.0f} s: "
                    "look at that host, and at what the launcher printed"
                )
            return False
        odd = [line for worker, hello in sorted(self.hellos.items()) for line in differences(self._own, worker, hello)]
        if odd:
            reason = "; ".join(odd[:4]) + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")
            self._hub.broadcast(Refuse(reason))
            self._hub.flush()
            if not any(hello.problem for hello in self.hellos.values()):
                reason += ": start all ranks with the same command and the same installation"
            raise HandshakeError(reason)
        return True


def differences(own: Hello, worker: int, hello: Hello) -> list[str]:
    """In what a rank differs from rank 0, a clause each."""
    who = f"rank {worker} on {hello.host.hostname}"
    if hello.problem:
        return [f"{who}: {hello.problem}"]
    if hello.protocol != own.protocol:
        return [f"{who} speaks protocol {hello.protocol}, rank 0 speaks {own.protocol}"]
    found = [
        f"{who} has {name} {hello.versions.get(name, 'missing')}, rank 0 has {version}"
        for name, version in own.versions.items()
        if hello.versions.get(name) != version
    ]
    if hello.config_digest != own.config_digest:
        found.append(f"{who} was started with other options than rank 0")
    if hello.model_fingerprint != own.model_fingerprint:
        found.append(f"{who} sees another model file (or adapter) under the same path than rank 0")
    return found
