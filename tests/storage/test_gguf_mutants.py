"""Thousands of damaged models: each is accepted or refused in a line, in little memory, and ggml survives the accepted.

`benchmarks/fuzz_gguf.py` does the same with as many as one likes.
"""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from tests.storage.ggml import ask_ggml, ask_llama, ggml_library
from tests.storage.mutants import mutants, reason, verdict

SEED = 20_250


@pytest.mark.slow
def test_a_damaged_model_is_accepted_or_refused_and_memory_stays_bounded(tmp_path: Path) -> None:
    reasons: Counter[str | None] = Counter()
    peak = 0
    for number, mutant in enumerate(mutants(SEED, 2500)):
        if number % 5 == 0:
            tracemalloc.start()
        try:
            said = verdict(tmp_path, mutant)
            if tracemalloc.is_tracing():
                peak = max(peak, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        reasons[None if said is None else reason(said)] += 1
    assert peak < 16 << 20
    # Mutants that are all refused, or all for the same reason, would test little.
    assert 100 < reasons[None] < 1500
    assert len(reasons) > 30


def accepted(folder: Path, seed: int, count: int) -> list[Path]:
    """Those of `count` mutants, each in a file of its own, that are accepted; of split models the file that changed."""
    paths = []
    for number, mutant in enumerate(mutants(seed, count)):
        if verdict(folder, mutant) is None:
            paths.append((folder / mutant.changed).rename(folder / f"accepted-{number}.gguf"))
    assert len(paths) > 100
    return paths


@pytest.mark.slow
@pytest.mark.system
def test_whatever_is_accepted_ggml_accepts_and_llama_cpp_survives(tmp_path: Path) -> None:
    library = ggml_library()
    if library is None:
        if os.environ.get("CI"):
            pytest.fail("llama-cpp-python's ggml is not there", pytrace=False)
        pytest.skip("llama-cpp-python's ggml is not there")
    paths = accepted(tmp_path, SEED + 1, 3000)
    assert [path for path, said in zip(paths, ask_ggml(library, paths), strict=True) if said != "model"] == []
    said = ask_llama(paths)
    assert "aborted" not in said
    assert said.count("loaded") > 10
