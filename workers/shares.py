"""How slots are divided among contexts."""

from __future__ import annotations

from scheduling.errors import ConfigError

SLOTS_PER_CONTEXT_MAX = 256
"""llama.cpp's LLAMA_MAX_SEQ."""


def slots_of_contexts(slots: int, contexts: int) -> list[int]:
    """Slots of each context: as even as can be, no context without one. Raises `ConfigError`."""
    if slots < 1 or contexts < 1:
        raise ConfigError(f"an engine needs at least one slot and one context, not {slots} and {contexts}")
    contexts = min(contexts, slots)
    shares = [slots // contexts + (place < slots % contexts) for place in range(contexts)]
    if shares[0] > SLOTS_PER_CONTEXT_MAX:
        needed = -(-slots // SLOTS_PER_CONTEXT_MAX)
        raise ConfigError(
            f"{slots} slots in {contexts} contexts are over llama.cpp's {SLOTS_PER_CONTEXT_MAX} a context; "
            f"use --contexts {needed} or fewer --slots"
        )
    return shares
