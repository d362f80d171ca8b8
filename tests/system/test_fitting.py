"""What fits, end to end on the CPU: said, stored, refused before loading, and long requests answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters import random_pair, write_adapter
from tests.launch import Launcher, run_alone
from tests.system.runs import Run, check_one_clear_line, prompts, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.mark.mpi
def test_ranks_share_a_host_and_a_long_request_has_a_place(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    long = {"custom_id": "long", "prompt": [100 + place % 5000 for place in range(3000)], "max_tokens": 4}
    given = write_lines(tmp_path / "in.jsonl", [*prompts(200, max_tokens=4), long])
    run = Run(tmp_path / "run")
    done = mpirun(3, "batch", "-m", tiny_model, "-i", given, "-o", run.path, "--coordinator-only", "--device", "cpu")
    assert done.rc == 0, done.stderr
    assert "free / 2 ranks" in done.stderr
    assert "8 slots of 256 tokens" in done.stderr
    run.check_whole(["long", *(f"r{k}" for k in range(200))])
    fits = [worker["fit"] for worker in run.about()["sessions"][0]["workers"]]
    assert [fit["slots"] for fit in fits] == [8, 8]
    assert all(fit["long_ctx_tokens"] >= 3004 for fit in fits)
    assert run.by_id()["long"]["llmpi"]["prompt_tokens"] == 3000


def test_what_cannot_fit_is_refused_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", prompts(4, max_tokens=4))
    run = tmp_path / "run"
    done = run_alone(
        "batch", "-m", tiny_model, "-i", given, "-o", run, "--slots", 256, "--ctx", 1 << 26, "--device", "cpu"
    )  # fmt: skip
    check_one_clear_line(done, 2, "--ctx")
    assert "margin" in done.stderr
    assert list((run / "logs").iterdir()) == []


def test_a_run_is_resumed_only_with_its_adapters(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.gguf", {"blk.0.attn_q.weight": random_pair(64, 64)})
    given = write_lines(tmp_path / "in.jsonl", prompts(3, max_tokens=4))

    def batch(*loras: str) -> tuple[int, str]:
        flags = [word for lora in loras for word in ("--lora", lora)]
        done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", "--device", "cpu", *flags)
        return done.rc, done.stderr

    assert batch(f"{adapter}:0.5")[0] == 0
    assert batch(f"{adapter}:0.5")[0] == 0
    code, said = batch(str(adapter))
    assert code == 2
    assert "adapters" in said
