"""`llmpi bench engine`: what it asks for, how it counts, and how it reads its peer. A fake engine and a fake peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from coordinator.bench_engine import BenchEngine
from coordinator.bench_load import Load
from coordinator.bench_peers import BatchedBench
from scheduling.errors import ConfigError, EngineError
from tests.launch import run_alone
from workers.protocol import EngineConfig

ENGINE = EngineConfig(model="m.gguf", slots=4, threads=2, gpu_layers=0, device_mask={"SOME_MASK": "7"})


def load(**changes: object) -> Load:
    options: dict[str, object] = {"requests": 50, "prompt_tokens": 8, "output_tokens": 16, "output_tokens_max": 16}
    return Load(**(options | changes))  # type: ignore[arg-type]


def lengths(given: Load, repeat: int = 0) -> list[int]:
    return [job.request.sampling.max_tokens or 0 for job in given.jobs(100, repeat)]


def test_prompts_are_different_and_the_same_again() -> None:
    jobs = load().jobs(100, 3)
    assert len({job.request.prompt for job in jobs}) == 50
    assert {len(job.request.prompt) for job in jobs} == {8}
    assert all(job.request.sampling.ignore_eos for job in jobs)
    assert [job.request.prompt for job in load().jobs(100, 3)] == [job.request.prompt for job in jobs]
    assert [job.request.prompt for job in load().jobs(100, 4)] != [job.request.prompt for job in jobs]


def test_lognormal_lengths_have_the_mean_that_was_asked_for_and_are_clipped() -> None:
    assert set(lengths(load())) == {16}
    drawn = lengths(load(requests=20_000, output_tokens=100, output_tokens_max=1_000_000, sigma=1.0))
    assert np.mean(drawn) == pytest.approx(100, rel=0.03)
    assert np.std(np.log(drawn)) == pytest.approx(1.0, rel=0.05)
    clipped = lengths(load(requests=500, output_tokens=100, output_tokens_max=120, sigma=2.0))
    assert (min(clipped), max(clipped)) == (1, 120)


def test_a_shared_prefix_is_all_that_is_shared() -> None:
    prompts = np.array([job.request.prompt for job in load(shared_prefix_tokens=5).jobs(10_000, 0)])
    assert (prompts[:, :5] == prompts[0, :5]).all()
    assert len(set(prompts[:, 5])) > 1


def test_long_prompts_come_when_they_are_due_and_once() -> None:
    interrupts = load(interrupt_tokens=30, interrupt_every_s=0.5).interrupts(100, 0)
    assert interrupts is not None
    assert interrupts.due(0.4, idle=True) == []
    (first,) = interrupts.due(0.6, idle=True)
    assert interrupts.due(0.7, idle=True) == []
    assert interrupts.due(1.1, idle=False) == []
    (second,) = interrupts.due(1.6, idle=True)
    assert (interrupts.made, interrupts.left_out) == (2, 1)
    assert len(interrupts.due(3.1, idle=True)) == 1
    assert (interrupts.made, interrupts.left_out) == (3, 3)
    assert (first.key, second.key) == (50, 51)
    assert {len(job.request.prompt) for job in (first, second)} == {30}
    assert load().interrupts(100, 0) is None


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"requests": 0}, "--requests"),
        ({"output_tokens": 0}, "--output-tokens"),
        ({"concurrency": 0}, "--concurrency"),
        ({"sigma": -1.0}, "--sigma"),
        ({"interrupt_tokens": -1}, "--interrupt-tokens"),
        ({"interrupt_every_s": 0.0}, "--interrupt-every"),
        ({"shared_prefix_tokens": 8}, "--shared-prefix"),
    ],
)
def test_what_cannot_be_asked_is_named(change: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        load(**change)


def peer(folder: Path, body: str, sequences: tuple[int, ...] = (4,)) -> BatchedBench:
    program = folder / "llama-batched-bench"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n")
    program.chmod(0o755)
    return BatchedBench(folder, ENGINE, 100, 200, sequences)


def test_the_peer_gets_the_same_work_and_its_figures_are_read(tmp_path: Path) -> None:
    told = tmp_path / "told"
    found = peer(
        tmp_path,
        f"json.dump([sys.argv[1:], os.environ['SOME_MASK']], open({str(told)!r}, 'w'))\n"
        "print('chatter')\nfor n in (2, 8): print(json.dumps({'pl': n, 'speed': n * 10.5}))",
        (2, 8),
    ).total_tokens_per_s()
    assert found == {2: 21.0, 8: 84.0}
    words, mask = json.loads(told.read_text())
    asked = dict(zip(words[::2], words[1::2], strict=True))
    assert mask == "7"
    assert asked["-npl"] == "2,2,8,8", "the second time counts"
    assert (asked["-npp"], asked["-ntg"], asked["-m"], asked["-ngl"], asked["-t"]) == ("100", "200", "m.gguf", "0", "2")
    assert int(asked["-c"]) == 8 * 512, "each sequence's cells are rounded up to 256"


def test_a_peer_that_fails_or_is_not_there_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama-batched-bench"):
        BatchedBench(tmp_path, ENGINE, 1, 1, (1,))
    with pytest.raises(EngineError, match=r"exit status 3; .*: 4\): out of memory"):
        peer(tmp_path, "sys.stderr.write('out of memory\\n'); sys.exit(3)").total_tokens_per_s()
    with pytest.raises(ConfigError, match="--peer-sequences"):
        peer(tmp_path, "", (32, 512))


def test_a_figure_that_is_missing_is_no_figure_that_is_worse(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="sequences: 128"):
        peer(tmp_path, "print(json.dumps({'pl': 32, 'speed': 9.0}))", (32, 128)).total_tokens_per_s()


def test_an_engine_that_cannot_start_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no model file"):
        BenchEngine(EngineConfig(model=str(tmp_path / "none.gguf"), slots=1))


@pytest.mark.slow
@pytest.mark.system
def test_everything_is_answered_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    peer(tmp_path, "print(json.dumps({'pl': 3, 'speed': 100.0}))")
    options = ("--slots", 3, "--requests", 10, "--prompt-tokens", 8, "--output-tokens", 5, "--repeats", 2)
    done = run_alone("bench", "engine", "-m", tiny_model, *options, "--peers", tmp_path, "--json")
    assert done.rc == 0, done.output
    found = json.loads(done.stdout)
    assert found["output_tokens_per_s"] == pytest.approx(found["total_tokens_per_s"] * 5 / 13)
    assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert found["peer_total_tokens_per_s"] == 100.0
    assert found["ratio"] == pytest.approx(found["total_tokens_per_s"] / 100.0, rel=0.01)
    assert found["steps"] > 0
    table = run_alone("bench", "engine", "-m", tiny_model, *options, "--concurrency", 2, "--sigma", "0.5")
    assert table.rc == 0, table.output
    assert "total tokens/s" in table.stdout
    assert "running at once" in table.stdout
