"""Which devices a rank may use, whatever backend the installed llama.cpp has. `look` is all that others need.

No GPU library is loaded: the backend is told by the files of the build, devices by NVML, the kernel or a small
program of the driver. What nobody tells is unknown, and said.
"""

from __future__ import annotations

from workers.devices.look import Devices, look

__all__ = ["Devices", "look"]
