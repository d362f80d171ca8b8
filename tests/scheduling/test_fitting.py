"""What fits: never more than there is, never more than is of use, and always something to do about what does not."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import ConfigError
from scheduling.fitting import DRIVER_BYTES, DRIVER_SHARE, MARGIN, SLOTS_GPU, SLOTS_GPU_UNKNOWN, Fit, Room, fit
from scheduling.lengths import Lengths
from scheduling.modelsize import CHECKED_ROWS, Ask, Layout, ModelShape, cells_of, needs
from tests.scheduling.shapes import B1, B8, B70, llama
from workers.speculation import ROWS_MAX

GB = 10**9
HOST = 256 * GB


def gpu(*gigabytes: float, ranks: int = 1, workers: int = 1, host: int | None = HOST) -> Room:
    return Room(
        gpu_bytes=tuple(int(size * GB) for size in gigabytes), gpu_ranks=ranks, host_bytes=host, workers=workers
    )


def alike(requests: int, tokens: int) -> Lengths:
    """So many requests of one length, known exactly."""
    return Lengths(requests, {cells_of(tokens) // 256: requests}, tokens, whole=True)


ONE_LONG = Lengths(1001, {1: 1000, 63: 1}, 16_128, whole=True)


# ---------------------------------------------------------------- what is preferred


def test_a_large_gpu_takes_all_layers_and_many_slots() -> None:
    fitted = fit(B1, Ask(), gpu(141), alike(2000, 256))
    assert (fitted.slots, fitted.contexts, fitted.ctx_tokens) == (SLOTS_GPU, 4, 256)
    assert (fitted.gpu_layers, fitted.ubatch_tokens, fitted.long_slots) == (-1, 2048, 0)


def test_few_long_slots_are_not_dealt_out_to_many_contexts() -> None:
    """Each context has buffers of its own: what they take is not there for long requests."""
    for gigabytes in range(20, 60):
        fitted = fit(B8, Ask(), gpu(gigabytes), Lengths(500, {64: 500}, 64 * 256, whole=False))
        assert fitted.contexts <= 2, fitted.said


@pytest.mark.parametrize(("wanted", "enough"), [(5000, 64), (50, 32)])
def test_where_room_is_short_buffers_make_way_for_slots(wanted: int, enough: int) -> None:
    seen = set()
    for tenths in range(78, 140, 2):
        room = gpu(tenths / 10)
        fitted = fit(B8, Ask(), room, alike(wanted, 512))
        small = fitted.ubatch_tokens == 512
        seen.add(small)
        large = fit(B8, Ask(ubatch_tokens=2048), room, alike(wanted, 512))
        if small:
            assert fitted.contexts == 1
            assert fitted.slots > large.slots
            assert large.contexts == 1 or large.slots < enough
        else:
            assert (fitted.slots, fitted.contexts) == (large.slots, 2 if wanted >= 64 else 1)
            assert fitted.slots >= enough
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("shape", "slots", "contexts"),
    [
        *[(B1, slots, contexts) for slots, contexts in ((512, 4), (128, 4), (127, 2), (64, 2), (63, 1), (8, 1))],
        *[(B8, slots, contexts) for slots, contexts in ((512, 2), (128, 2), (64, 2), (63, 1), (8, 1))],
    ],
)
def test_a_small_model_gets_more_contexts_where_each_has_enough_slots(
    shape: ModelShape, slots: int, contexts: int
) -> None:
    assert fit(shape, Ask(slots=slots), gpu(141), alike(2000, 256)).contexts == contexts
    assert fit(shape, Ask(slots=slots, contexts=3), gpu(141), alike(2000, 256)).contexts == 3


def test_what_runs_beside_the_slots_is_in_the_sum() -> None:
    plain = needs(B8, Ask(), Layout(B8.offloadable, 2, 2048, 64, 1024), 1)
    scores = needs(B8, Ask(scores=True, batch_tokens=4096), Layout(B8.offloadable, 2, 2048, 64, 1024), 1)
    cells = 2 * (1024 + 4096)
    assert scores.gpu_caches - plain.gpu_caches == cells * B8.token_bytes("f16", "f16")
    assert scores.gpu_buffers - plain.gpu_buffers > 2 * (128 << 20)
    embeds = needs(B8, Ask(input_tokens=3000), Layout(B8.offloadable, 2, 2048, 64, 1024), 1)
    assert embeds.gpu_caches - plain.gpu_caches == 2 * 3072 * B8.token_bytes("f16", "f16")
    whole = needs(B8, Ask(input_tokens=3072), Layout(B8.offloadable, 2, 2048, 64, 1024), 1)
    assert embeds == whole, "llama.cpp plans with whole rows of sequences"
    # A GPU that has just room for the slots has less of it with them.
    slots = [fit(B8, Ask(scores=beside), gpu(12), alike(5000, 1024)).slots for beside in (False, True)]
    assert slots[0] > slots[1] > 0


def test_there_are_never_more_slots_than_a_worker_has_requests() -> None:
    assert fit(B1, Ask(), gpu(141), alike(5, 256)).slots == 5
    assert fit(B1, Ask(), gpu(141, workers=4), alike(9, 256)).slots == 3
    seen_in_part = Lengths(5, {1: 5}, 256, whole=False)
    assert fit(B1, Ask(), gpu(141), seen_in_part).slots == SLOTS_GPU
    assert fit(B1, Ask(), gpu(141), None).slots == SLOTS_GPU_UNKNOWN


def test_one_long_request_does_not_size_all_slots() -> None:
    fitted = fit(B8, Ask(), gpu(80), ONE_LONG)
    assert fitted.ctx_tokens == 256
    assert fitted.long_ctx_tokens >= 16_128
    assert 1 <= fitted.long_slots <= 4
    assert fitted.slots >= 400


@pytest.mark.parametrize("short", [2, 40])
def test_one_long_request_among_few_does_not_size_all_slots_either(short: int) -> None:
    fitted = fit(B8, Ask(), gpu(80), Lengths(short + 1, {1: short, 63: 1}, 16_128, whole=True))
    assert fitted.ctx_tokens == 256
    assert fitted.long_ctx_tokens >= 16_128


def test_lengths_that_differ_little_need_no_long_slots() -> None:
    fitted = fit(B8, Ask(), gpu(80), Lengths(1000, {3: 995, 5: 5}, 1280, whole=True))
    assert (fitted.ctx_tokens, fitted.long_slots) == (1280, 0)


def test_an_input_that_was_not_read_to_its_end_keeps_room_for_the_longest() -> None:
    fitted = fit(B1, Ask(), gpu(80), Lengths(10_000, {1: 10_000}, 256, whole=False))
    assert (fitted.long_ctx_tokens, fitted.ctx_tokens) == (B1.train_ctx_tokens, 256)


def test_no_slot_exceeds_what_the_model_was_trained_with_unless_stretched() -> None:
    small = llama(16, 2048, 8192, 32, 8, trained=2000)
    wanted = alike(1000, 10_000)
    fitted = fit(small, Ask(), gpu(80), wanted)
    assert (fitted.ctx_tokens, fitted.long_slots) == (2000, 0)
    assert fit(small, Ask(rope_factor=4.0), gpu(80), wanted).ctx_tokens == 8000


def test_what_was_asked_for_is_taken() -> None:
    ask = Ask(slots=7, ctx_tokens=1000, contexts=3, gpu_layers=9, ubatch_tokens=64)
    fitted = fit(B1, ask, gpu(80), alike(1000, 256))
    assert (fitted.slots, fitted.ctx_tokens, fitted.contexts, fitted.gpu_layers) == (7, 1000, 3, 9)
    assert (fitted.ubatch_tokens, fitted.long_slots) == (64, 0)
    assert fit(B1, Ask(gpu_layers=0), gpu(80), alike(1000, 256)).gpu_layers == 0


def test_ranks_that_share_a_gpu_take_their_shares() -> None:
    alone = fit(B8, Ask(), gpu(24), alike(10_000, 1024))
    shared = fit(B8, Ask(), gpu(24, ranks=2), alike(10_000, 1024))
    assert 0 < 2 * shared.slots < alone.slots
    assert "/ 2 ranks" in shared.said


def test_caches_of_fewer_bits_hold_more_slots() -> None:
    plain = fit(B8, Ask(), gpu(16), alike(10_000, 2048))
    packed = fit(B8, Ask(type_k="q8_0", type_v="q8_0"), gpu(16), alike(10_000, 2048))
    assert packed.slots > 1.4 * plain.slots


def test_what_cuda_takes_goes_by_all_memory_of_a_gpu_and_not_by_what_is_free() -> None:
    """On a large GPU it takes most of the last gigabyte."""
    small, full = (
        fit(B1, Ask(), Room(gpu_bytes=(GB,), gpu_total_bytes=(size * GB,), host_bytes=HOST), alike(8, 256))
        for size in (1, 150)
    )
    assert small == fit(B1, Ask(), gpu(1), alike(8, 256))
    assert small.gpu_layers > 0
    assert full.gpu_layers == 0
    assert "nothing on the GPU, which is too small" in full.said


def test_a_model_split_by_tensors_has_two_contexts_for_many_slots_unless_more_are_needed() -> None:
    pair = gpu(141, 141)
    assert fit(B1, Ask(split="tensor"), pair, alike(256, 256)).contexts == 2
    assert fit(B8, Ask(split="tensor", slots=64), pair, alike(256, 256)).contexts == 2
    assert fit(B8, Ask(split="tensor", slots=63), pair, alike(256, 256)).contexts == 1
    assert fit(B1, Ask(), pair, alike(256, 256)).contexts == 4
    assert fit(B8, Ask(split="tensor"), pair, alike(1024, 256)).contexts == 4
    assert fit(B8, Ask(split="tensor", contexts=2), pair, alike(64, 256)).contexts == 2


def test_a_gpu_of_one_gigabyte_gets_some_layers() -> None:
    fitted = fit(B1, Ask(), gpu(1), alike(1000, 256))
    assert 1 <= fitted.gpu_layers < B1.layers
    assert fitted.slots >= 4
    assert f"{fitted.gpu_layers} of {B1.offloadable} layers on the GPU" in fitted.said


def test_a_gpu_that_is_too_small_for_anything_is_left_alone() -> None:
    fitted = fit(B70, Ask(), gpu(1), alike(1000, 256))
    assert fitted.gpu_layers == 0
    assert "nothing on the GPU" in fitted.said


@pytest.mark.parametrize(("shape", "megabytes"), [(B1, 1300), (B8, 1700)])
def test_a_few_layers_on_a_gpu_are_not_worth_that_the_longest_request_fails(shape: ModelShape, megabytes: int) -> None:
    """Little is left of a GPU that is large: CUDA takes half of it."""
    room = Room(gpu_bytes=(megabytes * 10**6,), gpu_total_bytes=(141 * GB,), host_bytes=HOST)
    fitted = fit(shape, Ask(), room, ONE_LONG)
    assert fitted.long_ctx_tokens == 16_128, fitted.said
    assert fitted.gpu_layers == 0
    short = fit(shape, Ask(), room, alike(1000, 256))
    assert short.gpu_layers > 0


@pytest.mark.parametrize(("asked", "is_said"), [(None, False), (0, False), (-1, True), (99, True)])
def test_layers_that_no_gpu_takes_are_spoken_of(asked: int | None, is_said: bool) -> None:
    said = fit(B1, Ask(gpu_layers=asked), Room(host_bytes=HOST), alike(8, 256)).said
    assert (f"no GPU for what --gpu-layers {asked} asks" in said) == is_said


def test_a_model_that_no_gpu_holds_alone_is_divided() -> None:
    fitted = fit(B70, Ask(), gpu(24, 24), alike(1000, 256))
    assert (fitted.gpu_layers, fitted.tensor_split) == (-1, ())
    assert fit(B70, Ask(), gpu(24), alike(1000, 256)).gpu_layers > 0


def test_unlike_gpus_get_shares_by_their_free_memory() -> None:
    assert fit(B70, Ask(), gpu(60, 20), alike(1000, 256)).tensor_split == (0.75, 0.25)
    assert fit(B70, Ask(split="tensor"), gpu(60, 30), alike(1000, 256)).tensor_split == ()


def test_on_a_cpu_the_memory_of_the_host_is_divided_among_its_ranks() -> None:
    room = Room(host_bytes=11 * GB, host_ranks=2, workers=2)
    fitted = fit(B8, Ask(), room, alike(1000, 512))
    assert 1 <= fitted.slots < 8
    assert (fitted.contexts, fitted.gpu_layers, fitted.ubatch_tokens) == (1, 0, 512)
    assert fitted.said.startswith("memory 11.0 GB free / 2 ranks")


def test_memory_that_nobody_knows_is_not_counted() -> None:
    fitted = fit(B8, Ask(), Room(gpu_bytes=(None,)), alike(5000, 256))
    assert (fitted.slots, fitted.gpu_layers) == (SLOTS_GPU, -1)
    assert "unknown" in fitted.said
    assert fit(B8, Ask(), Room(), alike(1000, 256)).slots == 8


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("ask", "room", "words"),
    [
        (Ask(slots=128, ctx_tokens=1 << 18), gpu(80), (r"--ctx \d+ or less", r"--slots \d+")),
        (Ask(slots=512, gpu_layers=-1), gpu(4), ("--gpu-layers auto",)),
        (Ask(slots=64, ctx_tokens=4096), Room(host_bytes=8 * GB), (r"--ctx \d+ or less", "memory 8.0 GB free")),
        (Ask(), Room(host_bytes=1 * GB), ("a smaller model", r"buffers is [\d.]+ GB too little:")),
        (Ask(), gpu(1, host=2 * GB), ("a smaller model", r"buffers is [\d.]+ GB too little:")),
        (
            Ask(),
            gpu(80, host=GB // 4),
            (r"memory 0\.2\d GB free", "GB too little: use a smaller model, or more memory"),
        ),
        (Ask(gpu_layers=-1), gpu(80, host=GB // 4), (r"memory 0\.2\d GB free", "a smaller model, or more memory$")),
    ],
)
def test_what_cannot_fit_is_refused_with_the_sum_and_what_would(ask: Ask, room: Room, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(B8, ask, room, alike(1000, 1024))
    said = str(caught.value)
    assert "free" in said
    assert "margin" in said
    assert "= -" not in said
    assert "\n" not in said
    for word in words:
        assert re.search(word, said), said


def test_what_is_said_to_fit_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        fit(B8, Ask(slots=128, ctx_tokens=1 << 18), gpu(80), alike(1000, 256))
    ctx, slots = (int(number) for number in re.findall(r"--(?:ctx|slots) (\d+)", str(caught.value)))
    assert fit(B8, Ask(slots=128, ctx_tokens=ctx), gpu(80)).ctx_tokens == ctx
    assert fit(B8, Ask(slots=slots, ctx_tokens=1 << 18), gpu(80)).slots == slots


def test_contexts_that_cannot_hold_the_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match="--contexts 3 or more"):
        fit(B1, Ask(slots=513, contexts=2), gpu(80))


def test_the_sum_adds_up() -> None:
    said = fit(B8, Ask(), gpu(80), ONE_LONG).said
    free, margin, model, buffers, left = (float(number) for number in re.findall(r"([\d.]+) GB", said))
    assert free - margin - model - buffers == pytest.approx(left, abs=0.3)


def test_drafts_have_room_for_their_logits() -> None:
    assert CHECKED_ROWS == ROWS_MAX


# ---------------------------------------------------------------- whatever is asked

shapes = st.sampled_from([B1, B8, B70, llama(2, 64, 128, 4, 2, vocab=500, trained=None)])
counts = st.dictionaries(st.integers(1, 200), st.integers(1, 2000), min_size=1, max_size=6)
looks = st.none() | st.builds(
    lambda counts, whole: Lengths(sum(counts.values()), counts, 256 * max(counts) + 77, whole), counts, st.booleans()
)
asks = st.builds(
    Ask,
    slots=st.none() | st.integers(1, 700),
    ctx_tokens=st.none() | st.integers(2, 40_000),
    gpu_layers=st.none() | st.integers(-1, 90),
    type_k=st.sampled_from(["f16", "q8_0"]),
    flash=st.booleans(),
    split=st.sampled_from(["layer", "tensor"]),
)
rooms = st.builds(
    Room,
    gpu_bytes=st.lists(st.integers(1 << 26, 150 * GB), max_size=3).map(tuple),
    gpu_ranks=st.integers(1, 3),
    host_bytes=st.integers(1 << 30, HOST),
    host_ranks=st.integers(1, 4),
    workers=st.integers(1, 8),
)


def fitted_or_none(shape: ModelShape, ask: Ask, room: Room, lengths: Lengths | None) -> Fit | None:
    try:
        return fit(shape, ask, room, lengths)
    except ConfigError:
        return None


@given(shapes, asks, rooms, looks)
def test_what_fits_takes_no_more_than_there_is(
    shape: ModelShape, ask: Ask, room: Room, lengths: Lengths | None
) -> None:
    fitted = fitted_or_none(shape, ask, room, lengths)
    if fitted is None:
        return
    gpus = len(room.gpu_bytes) if fitted.gpu_layers else 0
    layers = shape.offloadable if fitted.gpu_layers < 0 else fitted.gpu_layers
    layout = Layout(
        layers, fitted.contexts, fitted.ubatch_tokens, fitted.slots, fitted.ctx_tokens, fitted.long_slots,
        fitted.long_ctx_tokens,
    )  # fmt: skip
    taken = needs(shape, ask, layout, gpus)
    assert room.host_bytes is not None
    assert taken.host <= room.host_bytes / room.host_ranks * (1 - MARGIN)
    if gpus:
        shares = [(free or 0) // room.gpu_ranks for free in room.gpu_bytes]
        room_bytes = sum(share * (1 - MARGIN) - min(DRIVER_BYTES, share // DRIVER_SHARE) for share in shares)
        assert taken.gpu <= room_bytes


@given(shapes, asks, rooms, looks)
def test_what_fits_is_what_was_asked_for(shape: ModelShape, ask: Ask, room: Room, lengths: Lengths | None) -> None:
    fitted = fitted_or_none(shape, ask, room, lengths)
    if fitted is None:
        return
    assert ask.slots in (None, fitted.slots)
    assert ask.ctx_tokens in (None, fitted.ctx_tokens)
    assert 1 <= fitted.contexts <= fitted.slots <= 256 * fitted.contexts
    if ask.slots is None and lengths is not None and lengths.whole:
        assert fitted.slots <= -(-lengths.sequences // room.workers)
    if fitted.long_slots:
        assert ask.ctx_tokens is None
        assert fitted.long_ctx_tokens > fitted.ctx_tokens


@given(shapes, rooms, looks, st.integers(2, 4))
def test_more_memory_never_makes_less_fit(shape: ModelShape, room: Room, lengths: Lengths | None, more: int) -> None:
    """Of slots of one given size, beside all layers."""
    ask = Ask(ctx_tokens=1000, contexts=1, ubatch_tokens=512, gpu_layers=-1)
    larger = Room(
        gpu_bytes=tuple(more * (free or 0) for free in room.gpu_bytes), gpu_ranks=room.gpu_ranks,
        host_bytes=more * (room.host_bytes or 0), host_ranks=room.host_ranks, workers=room.workers,
    )  # fmt: skip
    small, large = (fitted_or_none(shape, ask, one, lengths) for one in (room, larger))
    if small is not None:
        assert large is not None
        assert large.slots >= small.slots


def test_only_a_gpu_that_chooses_tokens_has_buffers_for_it() -> None:
    """It does not where the output layer is not there, or is split."""

    def logits_of(layers: int, ask: Ask) -> tuple[int, int]:
        layout = Layout(layers, 1, 512, 32, 512)
        one = needs(B8, ask, layout, 1)
        none = needs(msgspec.structs.replace(B8, vocab_tokens=0), ask, layout, 1)
        return one.gpu_buffers - none.gpu_buffers, one.host_buffers - none.host_buffers

    size = 4 * B8.vocab_tokens * 32
    assert logits_of(B8.offloadable, Ask()) == (2 * size, 4 * size)
    assert logits_of(B8.offloadable - 1, Ask()) == (size, size)
    assert logits_of(B8.offloadable, Ask(split="tensor")) == (size, size)
