"""Whether a custom_id was seen before, at 8 bytes an id.

An id is kept as 64 bits of BLAKE2b. Two different ids of n share one with a probability of about n**2 / 2**65:
3e-8 for a million. Where the file can be read again the caller makes sure; where it cannot, that is the risk that
a good request is called a duplicate. Nothing here knows where ids come from.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


def hash_id(custom_id: str) -> bytes:
    """The 8 bytes kept for an id: the same in every process, unlike Python's own hash."""
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def repeated(sorted_hashes: Hashes) -> Hashes:
    """The values that are more than once in `sorted_hashes` (1-D, ascending), each once."""
    return np.unique(sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]])


class IdSet:
    """A set of hashes that grows by batches: sorted runs, merged when a new one is no shorter than the last.

    So there are at most log2(n) runs, each hash is moved log2(n) times, and no memory lies idle as in a table.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def __len__(self) -> int:
        return sum(run.size for run in self._runs)

    def add(self, digests: bytes | bytearray) -> npt.NDArray[np.bool_]:
        """Add hashes, 8 bytes each (see `hash_id`). True where one was there before, or earlier in this batch."""
        batch = np.frombuffer(bytes(digests), np.dtype("<u8")).astype(np.uint64)
        values, first = np.unique(batch, return_index=True)
        seen = np.ones(batch.size, np.bool_)
        seen[first] = False
        known = np.zeros(values.size, np.bool_)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, values), run.size - 1)
            known |= run[place] == values
        seen[first[known]] = True
        self._push(values[~known])
        return seen

    def _push(self, run: Hashes) -> None:
        if run.size == 0:
            return
        while self._runs and self._runs[-1].size <= run.size:
            run = np.concatenate((self._runs.pop(), run))
            run.sort(kind="stable")
        self._runs.append(run)
