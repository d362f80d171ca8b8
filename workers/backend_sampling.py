"""Choosing tokens where the logits are: nodes that are added to llama.cpp's graph of a pass.

A row of logits is half a megabyte. Taking all rows of a step to the host, to look there for the largest of each, costs
more than half of a small model's step. llama.cpp can sample on the GPU itself, but builds a chain of nodes for each
sequence and fetches what they make one by one, which is slower still. Here it is asked to do so, with samplers of our
own, which add nothing for their sequence, but once for each graph two nodes over all rows: the place of the largest
logit, and the sum, which is not finite if any logit is not. llama.cpp then leaves all logits where they are. Rows that
are needed for anything else are fetched from there one by one (`BackendSampling.fetch`).

Where logits are equal, which of them is the largest is the device's to say; on the CPU it is the first.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from scheduling.errors import EngineError
from workers.sampling import NOT_FINITE, Floats

Ints = npt.NDArray[np.int32]

LOGITS = b"result_output"
"""What llama.cpp calls the tensor of logits in a graph."""

_Pointer, _Size = ctypes.c_void_p, ctypes.c_size_t


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(result, *arguments)((name, libggml))


_argmax = _function("ggml_argmax", _Pointer, _Pointer, _Pointer)
_sum_rows = _function("ggml_sum_rows", _Pointer, _Pointer, _Pointer)
_expand = _function("ggml_build_forward_expand", None, _Pointer, _Pointer)
_set_output = _function("ggml_set_output", None, _Pointer)
_find = _function("ggml_graph_get_tensor", _Pointer, _Pointer, ctypes.c_char_p)
_count = _function("ggml_nelements", ctypes.c_int64, _Pointer)
_get = _function("ggml_backend_tensor_get", None, _Pointer, _Pointer, _Size, _Size)


class BackendSampling:
    """What is added to the graphs of one context, and how to get at it. `attach` it before the context is made; it must
    live as long. One thread owns it: that which decodes."""

    def __init__(self, sequences: int, outputs: int, vocab_tokens: int) -> None:
        """`outputs`: most rows of a pass whose logits are wanted."""
        self._vocab_tokens = vocab_tokens
        self._built = False
        self._logits = self._best = self._sums = 0
        self._ids: Ints = np.empty(outputs, np.int32)
        self._sound: Floats = np.empty(outputs, np.float32)
        self._interface = self._make_interface()
        self._chains = (lib.llama_sampler_seq_config * sequences)()
        for sequence, entry in enumerate(self._chains):
            chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init(ctypes.byref(self._interface), None))
            entry.seq_id, entry.sampler = sequence, ctypes.cast(chain, _Pointer)

    def _make_interface(self) -> Any:
        interface = lib.llama_sampler_i()
        for name, function in (
            ("name", lambda _sampler: b"rows"),
            ("accept", lambda _sampler, _token: None),
            ("apply", lambda _sampler, _candidates: None),
            ("backend_init", lambda _sampler, _buffer_type, _outputs: True),
            ("backend_apply", self._apply),
            ("backend_reset", self._reset),
        ):
            setattr(interface, name, dict(lib.llama_sampler_i._fields_)[name](function))
        return interface

    def attach(self, params: Any) -> None:
        """Have a context that is made with `params` use it."""
        params.samplers = self._chains
        params.n_samplers = len(self._chains)

    # ------------------------------------------------ called by llama.cpp as it builds a graph

    def _reset(self, _sampler: Any) -> None:
        self._built = False

    def _apply(self, _sampler: Any, context: int, graph: int, data: Any) -> None:
        try:
            given = data.contents.logits
            # What is left here would be fetched.
            data.contents.logits = None
            logits = _find(graph, LOGITS)
            if logits is None:
                # Not a graph of the model: llama.cpp counts the nodes for which it must have room.
                data.contents.candidates = _argmax(context, given)
                data.contents.probs = _sum_rows(context, given)
            elif not self._built:
                self._built = True
                self._logits = logits
                self._best, self._sums = _argmax(context, logits), _sum_rows(context, logits)
                for tensor in (self._best, self._sums):
                    _set_output(tensor)
                    _expand(graph, tensor)
        except Exception:  # a callback from C has nobody to raise to; `best` finds nothing then
            self._best = 0
            traceback.print_exc()

    # ------------------------------------------------ after a pass

    def best(self, rows: int) -> Ints:
        """(rows,) the place of the largest logit of each row of the last pass, NOT_FINITE where any is not.

        The device must be done. Raises `EngineError` if llama.cpp cut the pass, so that rows are gone.
        """
        self._check(rows)
        ids, sound = self._ids[:rows], self._sound[:rows]
        _get(self._best, ids.ctypes.data, 0, ids.nbytes)
        _get(self._sums, sound.ctypes.data, 0, sound.nbytes)
        return np.where(np.isfinite(sound), ids, np.int32(NOT_FINITE))

    def fetch(self, logits: Floats, places: npt.NDArray[np.int64]) -> None:
        """Fill the lines `places` (ascending) of `logits`, (rows, vocab_tokens), with those rows of the last pass."""
        line = logits.strides[0]
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        for run in np.split(places, breaks):
            first, count = int(run[0]), run.size
            _get(self._logits, logits.ctypes.data + first * line, first * line, count * line)

    def _check(self, rows: int) -> None:
        found = int(_count(self._best)) if self._best else 0
        if found != rows:
            raise EngineError(
                f"llama.cpp computed {found} rows of logits in one piece where {rows} were expected; use "
                "--no-gpu-sampling, and please report this with the name of the model"
            )
