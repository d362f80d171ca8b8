"""What fits: slots, contexts and layers on the GPU, from a model's sizes, free memory and the lengths of the requests.

`scheduling.modelsize.needs` adds up the bytes of one `Layout`. Here is the search: of the layouts that the options
leave open the first is taken that fits with enough slots, else the one with most. All layers on the GPU come first,
and among those several contexts and large micro-batches. Only if not one slot fits beside the whole model, fewer layers
are offloaded; only if that does not help, none.

Slots have cells of their own (nothing is over-committed), so long requests are not what all slots are sized by: a few
long slots, in a context of their own that is opened when the first such request comes, have room set aside here.

Pure arithmetic: where memory, model and requests were looked at is not known here. What cannot fit raises ConfigError,
with the same sum and with what would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from scheduling.errors import ConfigError
from scheduling.lengths import Lengths
from scheduling.modelsize import CELLS_TOGETHER, Ask, Layout, ModelShape, Needs, cells_of, needs
from scheduling.wording import counted

SLOTS_GPU = 1024
SLOTS_GPU_UNKNOWN = 128
"""Where nobody knows how many requests will come."""
SLOTS_CPU = 8
"""A CPU computes; more rows at once bring it little. Also for a model that is not all on its GPU."""
SLOTS_ENOUGH = 32
"""Fewer than these, if more are wanted, are a reason to save on buffers, or on slots that nobody may fill."""
SLOTS_FEW = 4
"""What long requests that are likely to come must leave to all others."""
LONG_SLOTS = 4
LONG_SHARE = 0.25
"""Of the memory for caches, what long requests may cost that may never come."""
SLOTS_OF_A_CONTEXT_MAX = 256
"""LLAMA_MAX_SEQ."""
CTX_UNKNOWN_TOKENS = 4096
CTX_LEAST_TOKENS = 512
HELD_SHARE = 0.99
"""Of the requests, those that ordinary slots are sized for."""
CONTEXTS_GPU, CONTEXTS_SMALL_GPU = 2, 4
SMALL_MODEL_BYTES = 2 << 30
"""Of weights. Passes of a small model are so short that a GPU waits for their launch: more contexts fill that. A larger
one's are not, and of fewer rows are less efficient."""
SLOTS_OF_A_CONTEXT_MIN = 32
"""No more contexts than have so many slots each: of fewer rows, two passes take longer than one of them all, and what
one context reads, another's sequences wait for as well."""
UBATCH_GPU, UBATCH_CPU = 2048, 512
MARGIN = 0.1
DRIVER_BYTES = 640 << 20
DRIVER_SHARE = 8
"""What CUDA takes by itself: DRIVER_BYTES, or of a small GPU one part in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Free memory, before it is divided among the workers that share it. None: nobody could say.

    `gpu_bytes`: of each GPU of this worker, none on the CPU. `gpu_total_bytes`: all that each of them has, free or not;
    empty if nobody knows. `workers`: how many there are in the whole job.
    """

    gpu_bytes: tuple[int | None, ...] = ()
    gpu_total_bytes: tuple[int | None, ...] = ()
    gpu_ranks: int = 1
    host_bytes: int | None = None
    host_ranks: int = 1
    workers: int = 1


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is to be. `long_slots` 0: there are none. `said`: the sum, for people."""

    slots: int
    contexts: int
    ctx_tokens: int
    gpu_layers: int
    ubatch_tokens: int
    long_slots: int = 0
    long_ctx_tokens: int = 0
    input_tokens: int = 0
    """Most tokens of an input to embed, where that is more than of a slot."""
    tensor_split: tuple[float, ...] = ()
    """Shares of the GPUs where their free memory differs."""
    said: str = ""


def fit(shape: ModelShape, ask: Ask, room: Room, lengths: Lengths | None = None) -> Fit:
    """What an engine is to be. `lengths` None: nobody knows what will be asked.

    Raises ConfigError: it cannot fit, or what was asked for contradicts itself.
    """
    return _Fitting(shape, ask, room, lengths).fit()


class _Fitting:
    """One search. Sizes in bytes are this worker's share."""

    def __init__(self, shape: ModelShape, ask: Ask, room: Room, lengths: Lengths | None) -> None:
        self.shape = shape
        self.ask = ask
        self.room = room
        self.lengths = lengths
        shares = [None if free is None else free // room.gpu_ranks for free in room.gpu_bytes]
        # What CUDA takes goes by how large a GPU is, however little of it is free.
        sizes = room.gpu_total_bytes or shares
        sized = [(share, size or share) for share, size in zip(shares, sizes, strict=True) if share is not None]
        known = [share for share, _ in sized]
        self.gpu_known = len(known) == len(shares)
        if ask.split == "tensor" and known:
            known = [min(known)] * len(known)
            sized = [(min(known), size) for _, size in sized]
        self.gpu_free = sum(known)
        self.gpu_room = sum(int(free * (1 - MARGIN)) - min(DRIVER_BYTES, size // DRIVER_SHARE) for free, size in sized)
        self.host_free = None if room.host_bytes is None else room.host_bytes // room.host_ranks
        self.host_room = None if self.host_free is None else int(self.host_free * (1 - MARGIN))
        trained = shape.train_ctx_tokens
        self.ctx_most = None if trained is None else max(2, int(trained * ask.rope_factor))

    def fit(self) -> Fit:
        gpus = len(self.room.gpu_bytes) if self.ask.gpu_layers != 0 else 0
        if gpus:
            found = self._best(self._whole(gpus), gpus)
            if found is None and self.ask.gpu_layers is None:
                found = self._best(self._parts(), gpus, SLOTS_FEW)
                if found is not None and not self._holds(found):
                    # A GPU that takes a few layers saves little: not worth that the longest request fails.
                    on_cpu = self._best(self._on_cpu(), 0)
                    if on_cpu is not None and self._holds(on_cpu):
                        return self._result(on_cpu, 0)
            if found is not None:
                return self._result(found, gpus)
            if self.ask.gpu_layers is not None:
                raise self._refusal(self._whole(gpus), gpus)
        found = self._best(self._on_cpu(), 0)
        if found is None:
            raise self._refusal(self._whole(gpus) if gpus else self._on_cpu(), gpus)
        return self._result(found, 0)

    # ------------------------------------------------ layouts, the preferred ones first

    def _whole(self, gpus: int) -> Iterator[Layout]:
        """All layers, or as many as were asked for."""
        asked = self.ask.gpu_layers
        layers = self.shape.offloadable if asked is None or asked < 0 else min(asked, self.shape.offloadable)
        if layers < self.shape.offloadable:
            yield from self._layouts(layers, 1, UBATCH_CPU, SLOTS_CPU)
            return
        most = SLOTS_GPU_UNKNOWN if self.lengths is None else SLOTS_GPU
        for contexts in range(max(-(-most // SLOTS_OF_A_CONTEXT_MAX), CONTEXTS_SMALL_GPU), CONTEXTS_GPU - 1, -1):
            yield from self._layouts(layers, contexts, UBATCH_GPU, min(most, contexts * SLOTS_OF_A_CONTEXT_MAX))
        yield from self._layouts(layers, 1, UBATCH_CPU, min(most, SLOTS_OF_A_CONTEXT_MAX))

    def _parts(self) -> Iterator[Layout]:
        for layers in range(self.shape.offloadable - 1, 0, -1):
            yield from self._layouts(layers, 1, UBATCH_CPU, SLOTS_CPU)

    def _on_cpu(self) -> Iterator[Layout]:
        yield from self._layouts(0, 1, UBATCH_CPU, SLOTS_CPU)

    def _layouts(self, layers: int, contexts: int, ubatch: int, most_slots: int) -> Iterator[Layout]:
        """With as many slots as are wanted, and the sizes that come into question."""
        if self.ask.contexts is not None:
            most_slots = min(most_slots, self.ask.contexts * SLOTS_OF_A_CONTEXT_MAX)
        slots = self.ask.slots or self._useful(most_slots)
        needed = -(-slots // SLOTS_OF_A_CONTEXT_MAX)
        if self.ask.contexts is not None and self.ask.contexts < needed:
            raise ConfigError(
                f"--slots {slots} with --contexts {self.ask.contexts}: llama.cpp has at most {SLOTS_OF_A_CONTEXT_MAX} "
                f"sequences in a context; use --contexts {needed} or more"
            )
        contexts = min(slots, self.ask.contexts or max(min(contexts, self._usual_contexts(slots)), needed))
        for ctx in self._ctx_sizes():
            yield Layout(layers, contexts, self.ask.ubatch_tokens or ubatch, slots, ctx)

    def _usual_contexts(self, slots: int) -> int:
        """As many as a GPU is given for the sake of speed, whatever the slots need."""
        # Split by tensors, passes take turns: one context's compute while the tokens of another's are chosen.
        small = self.shape.weight_bytes < SMALL_MODEL_BYTES and self.ask.split != "tensor"
        for contexts in (CONTEXTS_SMALL_GPU, CONTEXTS_GPU) if small else (CONTEXTS_GPU,):
            if slots >= contexts * SLOTS_OF_A_CONTEXT_MIN:
                return contexts
        return 1

    def _useful(self, most: int) -> int:
        """No more slots than this worker will have sequences."""
        if self.lengths is None or not self.lengths.whole:
            return most
        return max(1, min(most, -(-self.lengths.sequences // self.room.workers)))

    def _ctx_sizes(self) -> Iterator[int]:
        if self.ask.ctx_tokens is not None:
            yield self.ask.ctx_tokens
        elif self.lengths is not None:
            # A few long ones have a long slot each, however large their share is.
            held = min(HELD_SHARE, max(0.5, 1 - LONG_SLOTS / sum(self.lengths.counts.values())))
            ctx, longest = self.lengths.tokens_of(held), self.lengths.tokens_of(1.0)
            yield self._trained(longest if longest <= 2 * ctx else ctx)
        else:
            ctx = CTX_UNKNOWN_TOKENS
            while ctx >= CTX_LEAST_TOKENS:
                yield self._trained(ctx)
                ctx //= 2

    def _trained(self, tokens: int) -> int:
        return tokens if self.ctx_most is None else min(tokens, self.ctx_most)

    # ------------------------------------------------ the search

    def _best(self, layouts: Iterator[Layout], gpus: int, enough: int = SLOTS_ENOUGH) -> Layout | None:
        """The first with enough slots, and room for the longest; else the one with most. None if none has any."""
        best: Layout | None = None
        for layout in layouts:
            fitted = self._fitted(layout, gpus)
            # With fewer contexts as many slots fit, or one less.
            if fitted is None or not (self.ask.contexts is not None or self._uses_contexts(fitted)):
                continue
            if self.ask.slots is not None or (self._holds(fitted) and fitted.slots >= min(layout.slots, enough)):
                return fitted
            if best is None or (self._holds(fitted), fitted.slots) > (self._holds(best), best.slots):
                best = fitted
        return best

    def _uses_contexts(self, layout: Layout) -> bool:
        """More than are usual must be needed for the slots."""
        needed = layout.slots > (layout.contexts - 1) * SLOTS_OF_A_CONTEXT_MAX
        return layout.contexts <= self._usual_contexts(layout.slots) or needed

    def _holds(self, layout: Layout) -> bool:
        """Whether the longest request that is likely to come has a place."""
        return max(layout.ctx_tokens, layout.long_ctx_tokens) >= self._long_tokens()[0] or bool(self.ask.ctx_tokens)

    def _fitted(self, layout: Layout, gpus: int) -> Layout | None:
        """`layout` with its long slots and as many of its slots as fit."""
        few = layout.slots if self.ask.slots is not None else min(layout.slots, SLOTS_FEW)
        if self._fits(layout._replace(slots=few), gpus):
            layout = self._with_long(layout, few, gpus)
        if self._fits(layout, gpus):
            return layout
        if self.ask.slots is not None:
            return None
        slots = _most(layout.slots - 1, lambda slots: self._fits(layout._replace(slots=slots), gpus))
        if slots > layout.contexts:
            slots -= slots % layout.contexts
        return layout._replace(slots=slots, contexts=min(slots, layout.contexts)) if slots else None

    def _with_long(self, layout: Layout, few: int, gpus: int) -> Layout:
        """Set room aside beside `few` slots for requests that are longer than those, where there can be some."""
        if self.ask.ctx_tokens is not None or not self._known(gpus):
            return layout
        likely, longest = self._long_tokens()
        if longest <= cells_of(layout.ctx_tokens):
            return layout
        beside = layout._replace(slots=few)
        left = self._left(beside, gpus)

        def spare(slots: int, tokens: int) -> int:
            return self._left(beside._replace(long_slots=slots, long_ctx_tokens=tokens), gpus)

        least = left - int(LONG_SHARE * left)
        for tokens in (longest, likely):
            for slots in (LONG_SLOTS, LONG_SLOTS // 2, 1):
                if tokens > layout.ctx_tokens and spare(slots, tokens) >= least:
                    return layout._replace(long_slots=slots, long_ctx_tokens=tokens)
        comfortable = _most(longest // CELLS_TOGETHER, lambda steps: spare(1, steps * CELLS_TOGETHER) >= least)
        tokens = CELLS_TOGETHER * comfortable
        if tokens < likely and spare(1, likely) >= 0:
            tokens = likely
        return layout._replace(long_slots=1, long_ctx_tokens=tokens) if tokens > layout.ctx_tokens else layout

    def _long_tokens(self) -> tuple[int, int]:
        """What the longest request is likely to need, and what one might need."""
        if self.lengths is None:
            return 0, self.ctx_most or 0
        likely = self._trained(self.lengths.tokens_of(1.0))
        if self.lengths.whole:
            return likely, self._trained(cells_of(self.lengths.longest_tokens))
        return likely, self.ctx_most or likely

    def _fits(self, layout: Layout, gpus: int) -> bool:
        taken = needs(self.shape, self.ask, layout, gpus)
        if gpus and self.gpu_known and taken.gpu > self.gpu_room:
            return False
        return self.host_room is None or taken.host <= self.host_room

    def _lacks_host(self, taken: Needs) -> bool:
        """Whether the host's memory alone is what does not suffice."""
        if self.host_room is None or taken.host <= self.host_room:
            return False
        return not self.gpu_known or taken.gpu <= self.gpu_room

    def _known(self, gpus: int) -> bool:
        return self.gpu_known if gpus else self.host_room is not None

    def _left(self, layout: Layout, gpus: int) -> int:
        """Bytes left where `layout` takes most; negative if it does not fit."""
        taken = needs(self.shape, self.ask, layout, gpus)
        host = None if self.host_room is None else self.host_room - taken.host
        if not gpus:
            return host or 0
        on_gpu = self.gpu_room - taken.gpu
        return on_gpu if host is None or host >= 0 else min(on_gpu, host)

    # ------------------------------------------------ in words

    def _result(self, layout: Layout, gpus: int) -> Fit:
        whole = bool(gpus) and layout.gpu_layers >= self.shape.offloadable
        free = [free for free in self.room.gpu_bytes if free is not None]
        uneven = gpus > 1 and self.gpu_known and max(free) > 1.05 * min(free) and self.ask.split != "tensor"
        return Fit(
            slots=layout.slots,
            contexts=layout.contexts,
            ctx_tokens=layout.ctx_tokens,
            gpu_layers=-1 if whole else layout.gpu_layers if gpus else 0,
            ubatch_tokens=layout.ubatch_tokens,
            long_slots=layout.long_slots,
            long_ctx_tokens=layout.long_ctx_tokens,
            tensor_split=tuple(round(one / sum(free), 3) for one in free) if uneven else (),
            said=f"{self._sum(layout, gpus)}: {self._what(layout, gpus)}",
        )

    def _sum(self, layout: Layout, gpus: int) -> str:
        """What there is, what is taken off, and what is left for caches."""
        taken = needs(self.shape, self.ask, layout, gpus)
        if gpus and not self._lacks_host(taken):
            where = "GPU" if gpus == 1 else f"{gpus} GPUs"
            free, room = (self.gpu_free, self.gpu_room) if self.gpu_known else (None, 0)
            ranks, total = self.room.gpu_ranks, self.gpu_free * self.room.gpu_ranks
            model, buffers = taken.gpu_model, taken.gpu_buffers
        else:
            where = "memory"
            free, room = self.host_free, self.host_room or 0
            ranks, total = self.room.host_ranks, self.room.host_bytes or 0
            model, buffers = taken.host_model, taken.host_buffers
        if free is None:
            return f"how much {where if where == 'memory' else 'GPU memory'} is free is unknown"
        shared = f" / {ranks} ranks" if ranks > 1 else ""
        driver = free - room - int(free * MARGIN)
        left = room - model - buffers
        return (
            f"{where} {gigabytes(total)} free{shared} - {gigabytes(free - driver - room)} margin - "
            f"{gigabytes(model)} model - {gigabytes(buffers + driver)} buffers "
            + (f"= {gigabytes(left)}" if left >= 0 else f"is {gigabytes(-left)} too little")
        )

    def _what(self, layout: Layout, gpus: int) -> str:
        parts = [f"{counted(layout.slots, 'slot')} of {counted(layout.ctx_tokens, 'token')}"]
        if layout.contexts > 1:
            parts[0] += f" in {layout.contexts} contexts"
        kib = self.shape.token_bytes(self.ask.type_k, self.ask.type_v) / 1024
        most = "" if self.shape.cache_known else "at most "
        parts[0] += f" ({most}{kib:,.4g} KiB a token)"
        if layout.long_slots:
            parts.append(f"{counted(layout.long_slots, 'long slot')} of {layout.long_ctx_tokens:,}")
        if gpus and layout.gpu_layers < self.shape.offloadable:
            parts.append(f"{layout.gpu_layers} of {self.shape.offloadable} layers on the GPU")
        elif self.room.gpu_bytes and not gpus and self.ask.gpu_layers is None:
            parts.append("nothing on the GPU, which is too small")
        elif not self.room.gpu_bytes and self.ask.gpu_layers:
            parts.append(f"no GPU for what --gpu-layers {self.ask.gpu_layers} asks")
        return ", ".join(parts)

    def _refusal(self, layouts: Iterator[Layout], gpus: int) -> ConfigError:
        """Why not even the most modest of `layouts` fits."""
        *_, layout = layouts
        if self.ask.slots is None:
            layout = layout._replace(slots=1, contexts=1)
        taken = needs(self.shape, self.ask, layout, gpus)
        caches = taken.gpu_caches if gpus and not self._lacks_host(taken) else taken.host_caches
        ways = [way for way in self._ways(layout, gpus) if way]
        what = f"{counted(layout.slots, 'slot')} of {counted(layout.ctx_tokens, 'token')}"
        need = f"{'needs' if layout.slots == 1 else 'need'} {gigabytes(caches)} of cache"
        way = f"use {', or '.join(ways)}" if ways else "use a smaller model, or more memory"
        return ConfigError(f"{what} {need}, but {self._sum(layout, gpus)}: {way}")

    def _ways(self, layout: Layout, gpus: int) -> Iterator[str]:
        """What would fit, by changing one thing."""
        cells = _most(
            layout.ctx_tokens // CELLS_TOGETHER,
            lambda steps: self._fits(layout._replace(ctx_tokens=steps * CELLS_TOGETHER), gpus),
        )
        if cells:
            yield f"--ctx {cells * CELLS_TOGETHER} or less"
        slots = _most(layout.slots, lambda slots: self._fits(layout._replace(slots=slots), gpus))
        if slots:
            yield f"--slots {slots}" + (" or fewer" if slots > 1 else "")
        if gpus and self.ask.gpu_layers is not None and not self._lacks_host(needs(self.shape, self.ask, layout, gpus)):
            yield "--gpu-layers auto"


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits; 0 if none does. What is smaller than one that fits, fits."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def gigabytes(size: int) -> str:
    """In GB of 10^9 bytes, with as many digits as are of interest."""
    amount = size / 1e9
    return f"{amount:,.0f} GB" if abs(amount) >= 100 else f"{amount:.1f} GB" if abs(amount) >= 1 else f"{amount:.2f} GB"
