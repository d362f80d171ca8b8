"""Every exception the project raises on purpose, in one tree.

    LlmpiError
    ├── UserError                what the user gave is wrong: exit 2, one line, no traceback
    │   ├── ConfigError          a flag or an option, or two that contradict each other
    │   ├── InputError           the file of requests: missing, empty, malformed, duplicate ids
    │   │   └── RequestError     one request: that request fails, the run goes on
    │   ├── ModelFileError       the model file: missing, not a GGUF, truncated, unsupported
    │   ├── ModelStoreError      the model store: no such model, a name or digest that is none, damaged, not writable
    │   ├── ModelSourceError     where a model is to come from: malformed, refused, not reachable, other than promised
    │   ├── RunDirError          the run directory: not writable, locked, of another run, damaged
    │   └── StoppedError         a signal came before anything was started: exit 3
    ├── PeerError                another rank or the engine broke the protocol
    │   ├── HandshakeError       a rank with another version, model or configuration
    │   └── ProtocolError        a message that no correct peer sends in this state
    ├── InfrastructureError      what the run stands on failed: exit 4
    │   ├── EngineError          an engine cannot start, died too often, or lost its GPU
    │   ├── RankLostError        a rank is gone
    │   │   └── RankFailedError  MPI says so, and the ranks left may go on without it
    │   ├── StagingError         a model cannot be brought to a node: no room, other bytes than were sent
    │   └── RecordError          the record cannot be written: exit 3, nothing acknowledged is lost
    └── BugError                 an invariant of ours does not hold; carries the story of the object

An error that concerns a rank, a request or an attempt names it. Messages are one sentence or two: what is
wrong, where, and what to do about it.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 3
EXIT_INFRASTRUCTURE = 4


class LlmpiError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code = EXIT_INFRASTRUCTURE


class UserError(LlmpiError):
    """Something the user can mend by changing what was given."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A flag, an option or a combination of them that cannot work."""


class InputError(UserError):
    """The input as a whole cannot be used."""


class RequestError(InputError):
    """One request cannot be run. `param` names the offending field, if one field is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelFileError(UserError):
    """The model file is missing, is no GGUF, or is damaged."""


class ModelStoreError(UserError):
    """The model store does not hold what was asked for, or cannot be used."""


class ModelSourceError(UserError):
    """A model cannot be had from the source that was named."""


class RunDirError(UserError):
    """The run directory cannot be used."""


class StoppedError(UserError):
    """The user stopped the job before it had begun."""

    exit_code = EXIT_RESUMABLE


class PeerError(LlmpiError):
    """Another process of the job broke the protocol."""


class HandshakeError(PeerError):
    """A rank does not belong to this job: other versions, another model, another configuration."""

    exit_code = EXIT_USAGE


class ProtocolError(PeerError):
    """A message that no correct peer sends."""


class InfrastructureError(LlmpiError):
    """Something the run stands on failed."""


class EngineError(InfrastructureError):
    """An engine cannot start, or cannot go on."""


class RankLostError(InfrastructureError):
    """A rank is gone and the job cannot go on without it."""


class RankFailedError(RankLostError):
    """MPI reports ranks that have died, or another rank has told of it. Those left may try again without them."""


class StagingError(InfrastructureError):
    """A model cannot be brought to a node. Says which node."""


class RecordError(InfrastructureError):
    """The durable record cannot be written. What was acknowledged before is safe."""

    exit_code = EXIT_RESUMABLE


class BugError(LlmpiError):
    """An invariant of this program does not hold. Please report it, with the text."""
