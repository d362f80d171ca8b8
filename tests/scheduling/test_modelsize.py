"""Bytes of weights, cells and buffers, beside what llama.cpp says that it takes."""

from __future__ import annotations

import pytest

from scheduling.modelsize import Ask, Layout, ModelShape, cells_of, graph_bytes, needs
from tests.scheduling.shapes import llama

SMOLLM2 = llama(30, 576, 1536, 9, 3, vocab=49_152)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("rows", "cells", "flash", "mebibytes"),
    [
        (512, 512, True, 14.0),
        (512, 4096, True, 17.5),
        (2048, 512, True, 56.0),
        (2048, 4096, True, 70.0),
        (512, 512, False, 16.4),
        (512, 4096, False, 86.4),
        (2048, 512, False, 65.5),
        (2048, 4096, False, 345.5),
    ],
)
def test_the_graph_is_not_underestimated(rows: int, cells: int, flash: bool, mebibytes: float) -> None:
    """The figures are llama.cpp's compute buffers for SmolLM2-135M on a CPU, 8 sequences."""
    estimate = graph_bytes(SMOLLM2, rows=rows, cells=cells, flash=flash) / MIB
    assert mebibytes * 0.999 <= estimate <= mebibytes * 1.5


def test_caches_are_what_llama_cpp_says() -> None:
    layout = Layout(gpu_layers=0, contexts=1, ubatch_tokens=512, slots=8, ctx_tokens=4000)
    assert needs(SMOLLM2, Ask(), layout, 0).host_caches == 720 * MIB
    packed = needs(SMOLLM2, Ask(type_k="q8_0", type_v="q4_0"), layout, 0).host_caches
    assert packed == 720 * MIB // 2 * 34 // 64 + 720 * MIB // 2 * 18 // 64


def test_layers_on_the_gpu_take_their_caches_with_them() -> None:
    layout = Layout(gpu_layers=11, contexts=1, ubatch_tokens=512, slots=8, ctx_tokens=4096)
    taken = needs(SMOLLM2, Ask(), layout, 1)
    assert taken.gpu_caches == 720 * MIB // 3
    assert taken.host_caches == 720 * MIB * 2 // 3
    assert taken.gpu_model == SMOLLM2.output_bytes + 10 * SMOLLM2.layer_bytes[0]
    assert taken.host_model == SMOLLM2.weight_bytes - taken.gpu_model


@pytest.mark.parametrize(("tokens", "cells"), [(1, 256), (256, 256), (257, 512)])
def test_cells_come_in_multiples(tokens: int, cells: int) -> None:
    assert cells_of(tokens) == cells


def test_a_matrix_that_is_input_and_output_counts_once_on_the_host() -> None:
    apart = llama(2, 64, 128, 4, 2, vocab=500)
    fields = {name: getattr(apart, name) for name in apart.__struct_fields__}
    tied = ModelShape(**fields | {"tied": True})
    assert apart.weight_bytes - tied.weight_bytes == apart.input_bytes
    assert apart.host_bytes(3) == tied.host_bytes(3) == apart.input_bytes
