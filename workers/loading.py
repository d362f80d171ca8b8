"""Choices, by name, of how a model is loaded. The command line offers them, so this imports nothing heavy."""

from __future__ import annotations

from typing import Literal

CacheType = Literal["f16", "q8_0", "q4_0"]
RopeScaling = Literal["none", "linear", "yarn"]
Split = Literal["layer", "row", "tensor"]
