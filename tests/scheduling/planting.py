"""Bugs planted in the control plane: each replaces a method of the real thing by one with a single mistake in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Patch = Callable[[pytest.MonkeyPatch], None]


class Mutants(list[Patch]):
    """Of one kind, in order."""

    def add(self, plant: Patch) -> Patch:
        self.append(plant)
        return plant


def wrap(patch: pytest.MonkeyPatch, owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, *args)`."""
    original = getattr(owner, name)

    def replaced(self: Any, *args: Any) -> Any:
        return around(original, self, *args)

    patch.setattr(owner, name, replaced)
