"""Choosing tokens where the logits are: nodes that are added to llama.cpp's graph of a pass.

A row of logits is half a megabyte. Taking all rows of a step to the host, to look there for the largest of each, costs
more than half of a small model's step. llama.cpp can sample on the GPU itself, but builds a chain of nodes for each
sequence and fetches what they make one by one, which is slower still. Here it is asked to do so, with samplers of our
own, which add nothing for their sequence, but once for each graph some nodes over all rows: the place of the largest
logit, the sum, which tells whether any logit is not finite, and where they are wanted shortlists with the sums of all
groups (`workers.shortlist`).
llama.cpp then leaves all logits where they are. Rows that are needed for anything else are fetched from there one by
one (`BackendSampling.fetch`).

A graph is used again as long as samplers and batches look the same. So for shortlists to come or go, a sampler must be
another one, upon which llama.cpp plans its memory anew: too much for each step. So lists go only when no row has wanted
one for a while; and sums are made at one temperature, which changes only when no row has had that for a while.

Where logits are equal, which of them is the largest is the device's to say; on the CPU it is the first.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from scheduling.errors import EngineError
from workers.groups import group_tokens
from workers.sampling import NOT_FINITE, Floats, Ids
from workers.shortlist import GROUPS, Shortlist, Sums

Ints = npt.NDArray[np.int32]

LOGITS = b"result_output"
"""What llama.cpp calls the tensor of logits in a graph."""

LISTS_KEPT = 64
"""Passes that give shortlists nobody wants, or sums at a temperature that nobody has, before that is changed."""

ENDS_MAX = 16
"""Tokens that may end a text whose logits are sent along: few have as many, and each costs a node."""

_Pointer, _Size, _Long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_Apply = ctypes.CFUNCTYPE(None, _Pointer, _Pointer, _Pointer, _Pointer)
_POOL_MAX, _DESCENDING = 0, 1


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(result, *arguments)((name, libggml))


_argmax = _function("ggml_argmax", _Pointer, _Pointer, _Pointer)
_sum_rows = _function("ggml_sum_rows", _Pointer, _Pointer, _Pointer)
_scale = _function("ggml_scale", _Pointer, _Pointer, _Pointer, ctypes.c_float)
_sub = _function("ggml_sub", _Pointer, _Pointer, _Pointer, _Pointer)
_exp = _function("ggml_exp", _Pointer, _Pointer, _Pointer)
_cont = _function("ggml_cont", _Pointer, _Pointer, _Pointer)
_get_rows = _function("ggml_get_rows", _Pointer, _Pointer, _Pointer, _Pointer)
_argsort = _function("ggml_argsort", _Pointer, _Pointer, _Pointer, ctypes.c_int)
_reshape_2d = _function("ggml_reshape_2d", _Pointer, _Pointer, _Pointer, _Long, _Long)
_reshape_3d = _function("ggml_reshape_3d", _Pointer, _Pointer, _Pointer, _Long, _Long, _Long)
_concat = _function("ggml_concat", _Pointer, _Pointer, _Pointer, _Pointer, ctypes.c_int)
_reshape_1d = _function("ggml_reshape_1d", _Pointer, _Pointer, _Pointer, _Long)
_view_1d = _function("ggml_view_1d", _Pointer, _Pointer, _Pointer, _Long, _Size)
_view_2d = _function("ggml_view_2d", _Pointer, _Pointer, _Pointer, _Long, _Long, _Size, _Size)
_pool_2d = _function("ggml_pool_2d", _Pointer, _Pointer, _Pointer, *[ctypes.c_int] * 5, *[ctypes.c_float] * 2)
_expand = _function("ggml_build_forward_expand", None, _Pointer, _Pointer)
_set_output = _function("ggml_set_output", None, _Pointer)
_nodes = _function("ggml_graph_n_nodes", ctypes.c_int, _Pointer)
_node = _function("ggml_graph_node", _Pointer, _Pointer, ctypes.c_int)
_find = _function("ggml_graph_get_tensor", _Pointer, _Pointer, ctypes.c_char_p)
_count = _function("ggml_nelements", ctypes.c_int64, _Pointer)
_get = _function("ggml_backend_tensor_get", None, _Pointer, _Pointer, _Size, _Size)


@dataclass
class _Nodes:
    """Tensors of the graph that was built last: their addresses, 0 for one that is not there."""

    logits: int = 0
    ids: int = 0
    """int32: (rows,) of the largest logits, then (rows, GROUPS) the groups that are listed."""
    values: int = 0
    """float32: (rows,) sums of the logits, then the largest, then the sums of exp(logit - largest), then (rows, GROUPS)
    the largest of each group that is listed."""
    listed: int = 0
    """float32: (rows, numbers): the logits of the groups that are listed, the sums of all groups, the ends' logits."""


class Window:
    """An array over `count` numbers of memory that is not ours, made anew only where it has moved."""

    def __init__(self, kind: Any, count: int) -> None:
        self._type = kind * count
        self._address = 0
        self._array: npt.NDArray[Any] = np.empty(0)

    def at(self, pointer: Any) -> npt.NDArray[Any]:
        """The numbers from `pointer` on."""
        address = ctypes.addressof(pointer.contents)
        if address != self._address:
            self._array = np.ctypeslib.as_array(self._type.from_address(address))
            self._address = address
        return self._array


class BackendSampling:
    """What is added to the graphs of one context, and how to get at it. `attach` it before the context is made; it must
    live as long. One thread owns it: that which decodes."""

    def __init__(self, sequences: int, outputs: int, vocab_tokens: int, eog_ids: Ids) -> None:
        """`outputs`: most rows of a pass whose logits are wanted. A vocabulary has room for a number of each.
        `eog_ids`: the tokens that may end a text."""
        self._vocab_tokens = vocab_tokens
        self._ends = eog_ids.tolist() if eog_ids.size <= ENDS_MAX else []
        self._group_tokens = self._list_numbers = 0
        # What is said of all rows together is fetched to where the logits of one have room.
        if outputs * (3 + GROUPS) <= vocab_tokens and (tokens := group_tokens(vocab_tokens)):
            self._list_numbers = GROUPS * tokens + vocab_tokens // tokens + len(self._ends)
            self._group_tokens = tokens if self._list_numbers <= vocab_tokens else 0
        self._nodes = _Nodes()
        self._built = False
        # At first, so that there is memory for them.
        self.lists = 1.0 if self._group_tokens else 0.0
        """The temperature of the sums that are made with shortlists; 0 if none are."""
        self._unwanted = LISTS_KEPT
        self._samplers: list[int] = []
        """Addresses, one for each sequence."""
        # llama.cpp has as much room for each of them as for the logits themselves.
        numbers = max(outputs, sequences) * vocab_tokens
        self._numbers = Window(ctypes.c_int32, numbers)
        self._values = Window(ctypes.c_float, numbers)
        self._rooms = Window(ctypes.c_float, numbers)
        self._expected: Ints = np.empty(0, np.int32)
        self._active: set[int] = set()
        """The samplers of sequences whose logits are wanted. What a sampler is said to have made is fetched by
        llama.cpp, behind the pass."""
        self._row = self._rows = 0
        """Of the graph that is being built: the next row, and how many there are."""
        self._callback = _Apply(self._apply)
        self._interfaces = [self._interface(resets) for resets in (True, False)]
        self._chains = (lib.llama_sampler_seq_config * sequences)()
        for sequence, entry in enumerate(self._chains):
            self._samplers.append(0)
            entry.seq_id, entry.sampler = sequence, self._chain(sequence)

    def _interface(self, resets: bool) -> Any:
        """Of the sampler that hears of each new graph first, or of another one."""
        interface = lib.llama_sampler_i()
        fields = dict(lib.llama_sampler_i._fields_)
        functions: dict[str, Callable[..., Any]] = {
            "name": lambda _sampler: b"rows",
            "accept": lambda _sampler, _token: None,
            "apply": lambda _sampler, _candidates: None,
            "backend_init": lambda _sampler, _buffer_type, _outputs: True,
        }
        if resets:
            functions["backend_reset"] = self._reset
        for name, function in functions.items():
            setattr(interface, name, fields[name](function))
        # Called for each sequence: with plain addresses instead of ctypes' pointers, which take longer to make.
        interface.backend_apply = ctypes.cast(self._callback, fields["backend_apply"])
        return interface

    def _chain(self, sequence: int) -> Any:
        sampler = lib.llama_sampler_init(ctypes.byref(self._interfaces[sequence > 0]), None)
        self._samplers[sequence] = ctypes.addressof(sampler.contents)
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(chain, sampler)
        return ctypes.cast(chain, _Pointer)

    def attach(self, params: Any) -> None:
        """Have a context that is made with `params` use it."""
        params.samplers = self._chains
        params.n_samplers = len(self._chains)

    def expect(self, sequences: Ints) -> None:
        """Before a pass: whose rows those are whose logits are wanted, ascending."""
        self._expected = sequences

    def want_lists(self, context: Any, wanted: bool, temperature: float = 0.0) -> None:
        """Before a pass: whether it should give shortlists, and with sums at which temperature; 0 for any. `context`:
        llama.cpp's."""
        lists = (temperature or self.lists or 1.0) if wanted else 0.0
        if lists == self.lists or not self._group_tokens:
            self._unwanted = 0
            return
        self._unwanted += 1
        if self.lists and self._unwanted < LISTS_KEPT:
            return
        self.lists, self._unwanted = lists, 0
        entry = self._chains[0]
        old, entry.sampler = entry.sampler, self._chain(0)
        lib.llama_set_sampler(context, 0, ctypes.cast(entry.sampler, lib.llama_sampler_p_ctypes))
        lib.llama_sampler_free(ctypes.cast(old, lib.llama_sampler_p_ctypes))

    # ------------------------------------------------ called by llama.cpp as it builds a graph

    def _reset(self, _sampler: Any) -> None:
        self._built = False

    def _apply(self, sampler: int, context: int, graph: int, data: int) -> None:
        try:
            given = lib.llama_sampler_data.from_address(data)
            row, given.logits = given.logits, None  # what is left here would be fetched
            if not self._built:
                # Without that name (plamo3) they are what was added last.
                logits = _find(graph, LOGITS) or (_node(graph, -1) if _nodes(graph) else None)
                if logits is None:
                    # Not a graph of the model: llama.cpp counts the nodes for which it must have room.
                    given.candidates, given.probs = _argmax(context, row), _sum_rows(context, row)
                    given.logits = _exp(context, row)
                    return
                self._built, self._row = True, 0
                self._active = {self._samplers[sequence] for sequence in self._expected.tolist()}
                self._build(context, graph, logits)
            nodes = self._nodes
            # A graph that is only measured, or of a piece of a pass, has other rows than were announced.
            if sampler not in self._active or self._row == self._rows:
                return
            if not self._row:
                given.candidates, given.probs = nodes.ids, nodes.values
            if nodes.listed:
                size = self._list_numbers
                given.logits = _view_1d(context, nodes.listed, size, self._row * size * 4)
            self._row += 1
        except Exception:  # a callback from C has nobody to raise to; `best` finds nothing then
            traceback.print_exc()

    def _build(self, context: int, graph: int, logits: int) -> None:
        best, sums = _argmax(context, logits), _sum_rows(context, logits)
        self._rows = rows = int(_count(sums))
        self._nodes = nodes = _Nodes(logits, best, sums)
        if self.lists and rows:  # a pass that only reads has none
            self._build_lists(context, nodes, rows)
        for tensor in filter(None, (nodes.ids, nodes.values, nodes.listed)):
            _set_output(tensor)
            _expand(graph, tensor)

    def _build_lists(self, context: int, nodes: _Nodes, rows: int) -> None:
        vocab, tokens = self._vocab_tokens, self._group_tokens
        groups, best, sums = vocab // tokens, nodes.ids, _reshape_1d(context, nodes.values, rows)
        peaks = _pool_2d(context, nodes.logits, _POOL_MAX, tokens, 1, tokens, 1, 0.0, 0.0)
        order = _argsort(context, peaks, _DESCENDING)
        first = _cont(context, _view_2d(context, order, GROUPS, rows, groups * 4, 0))
        listed = _get_rows(context, _reshape_3d(context, nodes.logits, tokens, groups, rows), first)
        nodes.ids = _concat(context, best, _reshape_1d(context, first, GROUPS * rows), 0)
        by_token = _reshape_3d(context, nodes.logits, 1, vocab, rows)
        top = _get_rows(context, by_token, _reshape_2d(context, best, 1, rows))
        top_rows = _reshape_2d(context, top, 1, rows)
        weights = _exp(context, _sub(context, nodes.logits, top_rows))
        total = _sum_rows(context, weights)
        if self.lists != 1.0:
            # From the logits once more: two of them at a time would need room for another one of all rows.
            below = _sub(context, nodes.logits, top_rows)
            weights = _exp(context, _scale(context, below, 1.0 / self.lists))
        weighed = _sum_rows(context, _reshape_3d(context, weights, tokens, groups, rows))
        largest = _get_rows(context, _reshape_3d(context, peaks, 1, groups, rows), first)
        nodes.values = sums
        for tensor, count in ((top, 1), (total, 1), (largest, GROUPS)):
            nodes.values = _concat(context, nodes.values, _reshape_1d(context, tensor, count * rows), 0)
        nodes.listed = _reshape_2d(context, listed, tokens * GROUPS, rows)
        nodes.listed = _concat(context, nodes.listed, _reshape_2d(context, weighed, groups, rows), 0)
        for end in self._ends:
            logit = _cont(context, _view_2d(context, nodes.logits, 1, rows, vocab * 4, end * 4))
            nodes.listed = _concat(context, nodes.listed, logit, 0)

    # ------------------------------------------------ after a pass

    def best(self, context: Any, place: int, rows: int) -> Ints:
        """(rows,) the place of the largest logit of each row of the last pass, NOT_FINITE where that is not or any is
        NaN. Waits for the GPU. `context`: llama.cpp's; `place`: of the first row in the batch.

        Raises `EngineError` if llama.cpp cut the pass, so that rows are gone.
        """
        found = int(lib.llama_get_sampled_candidates_count_ith(context, place))
        if found != rows * (1 + GROUPS if self._nodes.listed else 1):
            raise EngineError(
                f"llama.cpp did not compute {rows} rows of logits in one piece, but gave {found} numbers; use "
                "--no-gpu-sampling, and please report this with the name of the model"
            )
        sums = self._values.at(lib.llama_get_sampled_probs_ith(context, place))[:rows]
        ids = self._numbers.at(lib.llama_get_sampled_candidates_ith(context, place))[:rows]
        best: Ints = np.where(np.isnan(sums), np.int32(NOT_FINITE), ids)
        # Tokens that a model never says (chameleon's images) have logits of -inf, or whose sum is.
        for row in np.flatnonzero(np.isinf(sums) & (best >= 0)).tolist():
            if not np.isfinite(self._logit(row, int(best[row]))):
                best[row] = NOT_FINITE
        return best

    def _logit(self, row: int, token: int) -> float:
        found = ctypes.c_float()
        _get(self._nodes.logits, ctypes.addressof(found), (row * self._vocab_tokens + token) * 4, 4)
        return found.value

    def shortlist(self, context: Any, place: int, rows: int) -> Shortlist | None:
        """The lists of the last pass, after `best`; None if it gave none."""
        if not self._nodes.listed:
            return None
        ids = self._numbers.at(lib.llama_get_sampled_candidates_ith(context, place))
        values = self._values.at(lib.llama_get_sampled_probs_ith(context, place))
        # Each row's list lies where all its logits would have room.
        room = self._rooms.at(lib.llama_get_sampled_logits_ith(context, place))
        lines = room[: rows * self._vocab_tokens].reshape(rows, self._vocab_tokens)
        sums, ends, last = GROUPS * self._group_tokens, self._list_numbers - len(self._ends), self._list_numbers
        return Shortlist(
            groups=ids[rows : (1 + GROUPS) * rows].reshape(rows, GROUPS),
            peaks=values[3 * rows : (3 + GROUPS) * rows].reshape(rows, GROUPS),
            logits=lines,
            tokens=self._group_tokens,
            top=values[rows : 2 * rows],
            total=values[2 * rows : 3 * rows].astype(np.float64),
            sums=Sums(self.lists, lines[:, sums:ends], lines[:, ends:last], self._of_group),
        )

    def _of_group(self, row: int, group: int) -> Floats:
        logits = np.empty(self._group_tokens, np.float32)
        first = row * self._vocab_tokens + group * self._group_tokens
        _get(self._nodes.logits, logits.ctypes.data, first * 4, logits.nbytes)
        return logits

    def fetch(self, logits: Floats, places: npt.NDArray[np.int64]) -> None:
        """Fill the lines `places` (ascending) of `logits`, (rows, vocab_tokens), with those rows of the last pass."""
        line = logits.strides[0]
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        for run in np.split(places, breaks):
            first, count = int(run[0]), run.size
            _get(self._nodes.logits, logits.ctypes.data + first * line, first * line, count * line)
