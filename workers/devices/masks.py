"""What the masks of the backends have in common: lists of indexes and names, cut off at the first that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduling.messages import Gpu

Named = Callable[[Sequence[Gpu], str], Gpu | None]
"""Which of the devices an entry names."""


def cut_off(gpus: Sequence[Gpu], variable: str, mask: str, named: Named) -> tuple[list[Gpu], str]:
    """Those of `gpus` that `mask` shows, in its order, and a remark for people.

    The first entry that names nothing, or a device again, hides itself and all that follow.
    """
    chosen: list[Gpu] = []
    for entry in map(str.strip, mask.split(",")):
        gpu = named(gpus, entry)
        if gpu is None or gpu in chosen:
            meant = entry in ("", "-1")
            why = "names no device" if gpu is None else "is named twice"
            return chosen, "" if meant else f"{variable}: {entry!r} {why}, so it hides the rest"
        chosen.append(gpu)
    return chosen, ""


def by_index(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    """The device at place `entry` of what is left."""
    return gpus[int(entry)] if entry.isascii() and entry.isdigit() and int(entry) < len(gpus) else None
