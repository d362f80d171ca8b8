"""The next token of the only sequence, with single numbers instead of arrays.

Between two passes of the only sequence a GPU stands still: what Python takes there is time lost, and an array of one
number takes as long as one of fifty. So where a sequence is alone, its token is the largest logit and nobody looks at
its text, a step is made here. What it does is what `workers.passes` and `workers.chooser` do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.choosing import largest
from workers.seating import Decoder
from workers.slots import NOBODY, Places, SlotArrays

_ROW: Places = np.zeros(1, np.int64)


class Alone:
    """Of one context. `eog`: (vocab_tokens,) which tokens end a generation. For each token: `slot`, `feed`, `wait`,
    `token`."""

    def __init__(self, decoder: Decoder, slots: SlotArrays, eog: npt.NDArray[np.bool_]) -> None:
        self._decoder = decoder
        self._slots = slots
        self._eog = eog
        self._eog_ids = np.flatnonzero(eog)
        self._best: npt.NDArray[np.int32] | None = None
        self._logits: npt.NDArray[np.float32] | None = None

    def slot(self) -> int:
        """The only slot in use, if it has put out something and its next step can be made here; else NOBODY."""
        slots = self._slots
        if slots.count - slots.free != 1:
            return NOBODY
        slot = int(slots.used.argmax())
        if (
            not slots.outputs.item(slot)
            or slots.length.item(slot) - slots.fed.item(slot) != 1
            or not slots.plain.item(slot)
            or slots.watched.item(slot)
        ):
            return NOBODY
        return slot

    def feed(self, slot: int) -> int:
        """Give the model the sequence's last token. Returns llama.cpp's code: see `Decoder.decode`."""
        slots, decoder = self._slots, self._decoder
        pos = slots.fed.item(slot)
        slots.fed[slot] = pos + 1
        decoder.token[0] = slots.tokens.item(slot, pos)
        decoder.pos[0] = pos
        decoder.seq[0] = slot
        decoder.wanted[0] = 1
        decoder.want_lists(False)
        return decoder.decode(1)

    def wait(self) -> None:
        """Until the device is done."""
        self._best = self._decoder.best(1)
        self._logits = self._decoder.logits(1) if self._best is None else None

    def token(self, slot: int) -> int:
        """The token that comes next; NOT_FINITE where the row of logits is damaged."""
        goes_on = self._slots.ignore_eos.item(slot)
        if self._best is not None:
            best = int(self._best.item())
            if best < 0 or not goes_on or not self._eog.item(best):
                return best
        logits = self._logits if self._logits is not None else self._decoder.logits(1, _ROW)
        if goes_on and self._eog_ids.size:
            logits[0, self._eog_ids] = -np.inf
        return int(largest(logits, _ROW).item())
