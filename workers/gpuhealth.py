"""Whether a worker's GPUs are still there, asked of NVML when its engine has died.

A GPU that has left the bus, or whose memory is damaged, says so in two ways: NVML's own calls fail for it ('GPU is
lost'), and the driver has logged an Xid, which NVML passes on as an event where it can (not inside MIG, not on every
card). Most Xids tell of a program's mistake, after which the GPU goes on: only those in `FATAL_XIDS` end a worker.

Nothing here raises. Where NVML cannot be asked there is nothing to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

FATAL_XIDS = {
    48: "double bit ECC error",
    79: "the GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
    140: "ECC error that was not recovered",
}
"""Of NVIDIA's list ('Xid errors', docs.nvidia.com/deploy/xid-errors): a GPU computes no more after these until it is
reset or replaced."""
LOST = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_GPU_NOT_FOUND", "NVML_ERROR_RESET_REQUIRED")
EVENTS_MAX = 64
"""Most events that are taken at once: a GPU that dies may send very many."""
EVENT_WAIT_MS = 100
"""An engine may be seen to die before the driver has said why."""


class GpuHealth:
    """The GPUs of one worker. `nvml` is the module pynvml, or None."""

    def __init__(self, nvml: Any | None, uuids: Sequence[str]) -> None:
        self._nvml = nvml
        self._uuids = tuple(uuids)
        self._handles: dict[str, Any] = {}
        self._events: Any | None = None
        self._xids: dict[str, int] = {}
        if nvml is not None and uuids:
            with contextlib.suppress(Exception):  # no driver, or a broken one
                nvml.nvmlInit()
                self._handles = {uuid: nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
                self._listen()

    def _listen(self) -> None:
        """Have the driver's Xids come to us."""
        nvml = self._nvml
        assert nvml is not None
        with contextlib.suppress(Exception):
            events = nvml.nvmlEventSetCreate()
            for handle in self._handles.values():
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            self._events = events

    def trouble(self) -> str:
        """What is wrong with the GPUs, for people. Empty if nothing is, or nobody knows."""
        self._take_events()
        for uuid, handle in self._handles.items():
            if found := self._lost(handle):
                return f"{uuid}: {found}"
            if (xid := self._xids.get(uuid)) is not None:
                return f"{uuid}: Xid {xid}, {FATAL_XIDS[xid]}"
        return ""

    def free(self) -> str:
        """How much memory of the GPUs is free, for people; empty if nobody knows."""
        said = []
        for handle in self._handles.values():
            with contextlib.suppress(Exception):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[union-attr]
                said.append(f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB")
        return f"free on its GPU now: {', '.join(said)}" if said else ""

    def _lost(self, handle: Any) -> str:
        """Why NVML cannot be asked about a GPU any more; empty if it can. What a driver does not support is no loss."""
        nvml = self._nvml
        assert nvml is not None
        lost = {getattr(nvml, name) for name in LOST if hasattr(nvml, name)}
        for ask in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetMemoryInfo):
            try:
                ask(handle)
            except nvml.NVMLError as error:
                if getattr(error, "value", None) in lost:
                    return str(error)
            except Exception:  # the driver's library is older than the question: that says nothing of the GPU
                continue
        return ""

    def _take_events(self) -> None:
        if self._events is None or self._nvml is None:
            return
        nvml = self._nvml
        with contextlib.suppress(Exception):  # a timeout says that there are no more
            for _ in range(EVENTS_MAX):
                event = nvml.nvmlEventSetWait_v2(self._events, EVENT_WAIT_MS)
                xid = int(event.eventData)
                if xid in FATAL_XIDS:
                    uuid = nvml.nvmlDeviceGetUUID(event.device)
                    self._xids[uuid.decode() if isinstance(uuid, bytes) else uuid] = xid
