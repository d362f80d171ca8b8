"""`llmpi.Pool` from a script: alone, and on every rank of an mpirun."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import Launcher, start_alone
from tests.system.runs import PATIENCE_S, ranks_of, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

CPU_SHARE_MAX = 0.01
IDLE_S = 5.0
TICK_S = 0.01
"""Processor time is counted in ticks: one more or less is no measurement."""

TELL = """
import json, os, sys
import llmpi
MODEL, RESULT = sys.argv[1:3]
RANK = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
def tell(**what):
    with open(f"{RESULT}.{RANK}", "w") as file:
        json.dump(what, file)
"""

GENERATE = (
    TELL
    + """
seen, ticks = [], []
with llmpi.Pool(MODEL, slots=4, ctx=256, on_result=seen.append, on_tick=ticks.append) as pool:
    first = list(pool.generate([f"number {k}" for k in range(12)], max_tokens=5, temperature=0))
    bad = list(pool.generate([{"prompt": "x", "top_q": 3}, "fine", "far too long " * 500], max_tokens=3))
    for result in pool.generate([f"again {k}" for k in range(30)], max_tokens=40, ignore_eos=True):
        break  # the rest is of no interest
    last = list(pool.generate(({"custom_id": f"c{k}", "prompt": f"last {k}"} for k in range(6)), max_tokens=5))
    messages = [{"role": "user", "content": "hello"}]
    pieces = list(pool.stream({"messages": messages}, max_tokens=9, temperature=0))
    [whole] = list(pool.generate([{"messages": messages}], max_tokens=9, temperature=0)) or [None]
    for piece in pool.stream("of no interest", max_tokens=100, ignore_eos=True):
        break
    empty = list(pool.generate([]))
with llmpi.Pool(MODEL, slots=2, engine="null") as pool:
    other = [result.custom_id for result in pool.generate(["a", "b", "c"])]
tell(
    root=pool.is_root, first=[r.custom_id for r in first], tokens=[r.output_tokens for r in first],
    last=[r.custom_id for r in last], errors=[r.error for r in sorted(bad, key=lambda r: r.index)],
    pieces=pieces, whole=whole and whole.text, seen=len(seen), ticks=len(ticks), empty=len(empty), other=sorted(other),
    ranks=sorted({r.rank for r in first}),
)
"""
)

FAIL = (
    TELL
    + """
with llmpi.Pool(MODEL, slots=2, ctx=256) as pool:
    for result in pool.generate([f"number {k}" for k in range(50)], max_tokens=50, ignore_eos=True):
        raise RuntimeError("the body of rank 0 has had enough")
"""
)

IDLE = (
    TELL
    + """
import time
with llmpi.Pool(MODEL, slots=2, ctx=256, engine="null") as pool:
    if pool.is_root:
        list(pool.generate(["one"], max_tokens=3))
        tell(ready=True)
        time.sleep(600)
"""
)


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def told(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"out.{rank}").read_text())
    return found


def check_root(found: dict[str, Any]) -> None:
    assert found["root"] is True
    assert sorted(found["first"]) == sorted(f"request-{k}" for k in range(12))
    assert found["tokens"] == [5] * 12
    assert "top_q" in found["errors"][0]
    assert found["errors"][1] is None
    assert "256" in found["errors"][2]
    assert sorted(found["last"]) == [f"c{k}" for k in range(6)]
    assert len(found["pieces"]) > 1
    assert "".join(found["pieces"]) == found["whole"]
    assert found["empty"] == 0
    assert found["other"] == ["request-0", "request-1", "request-2"]
    assert found["seen"] >= 12 + 3 + 1 + 6 + 1


def test_pool_alone(tiny_model: Path, tmp_path: Path) -> None:
    with start_alone(tiny_model, tmp_path / "out", program=[script(tmp_path, GENERATE)]) as job:
        done = job.wait(PATIENCE_S)
    assert done.rc == 0, done.output
    check_root(told(tmp_path, 0))


@pytest.mark.mpi
def test_pool_under_mpirun(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    done = mpirun(3, tiny_model, tmp_path / "out", program=[script(tmp_path, GENERATE)], timeout_s=PATIENCE_S)
    assert done.rc == 0, done.output
    check_root(told(tmp_path, 0))
    # All of one rank if the other's engine loads late: more was not promised.
    assert set(told(tmp_path, 0)["ranks"]) <= {1, 2}
    for rank in (1, 2):
        found = told(tmp_path, rank)
        assert found["root"] is False
        assert not found["first"]
        assert not found["last"]
        assert not found["pieces"]
        assert found["whole"] is None


@pytest.mark.mpi
def test_exception_in_rank_0s_body_releases_the_others(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    done = mpirun(3, tiny_model, tmp_path / "out", program=[script(tmp_path, FAIL)])
    assert done.rc == 1, done.output
    assert "the body of rank 0 has had enough" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("MODEL, slotz=4", "slotz"),
        ("MODEL, slots='many'", "slots"),
        ("MODEL, slots=0", "slots"),
        ("MODEL + 'x'", "does not exist"),
    ],
)
def test_pool_refuses_what_it_cannot_do(tiny_model: Path, tmp_path: Path, arguments: str, word: str) -> None:
    text = TELL + f"with llmpi.Pool({arguments}) as pool:\n    print(list(pool.generate(['x'])))\n"
    with start_alone(tiny_model, tmp_path / "out", program=[script(tmp_path, text)]) as job:
        done = job.wait(PATIENCE_S)
    assert done.rc == 1, done.output
    last = done.stderr.strip().splitlines()[-1]
    assert "Error" in last, done.output
    assert word in last, done.output


@pytest.mark.mpi
def test_missing_model_under_mpirun_ends_every_rank(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(3, tmp_path / "no.gguf", tmp_path / "out", program=[script(tmp_path, GENERATE)])
    assert done.rc == 1, done.output
    assert "no.gguf" in done.stderr


def processor_s(processes: list[psutil.Process]) -> list[float]:
    """Processor seconds that each has used in its life."""
    return [times.user + times.system for times in (process.cpu_times() for process in processes)]


@pytest.mark.mpi
def test_idle_ranks_cost_next_to_nothing(mpirun: Launcher, tmp_path: Path) -> None:
    program = [script(tmp_path, IDLE)]
    with mpirun.start(3, "none", tmp_path / "out", program=program) as job:
        until(lambda: (tmp_path / "out.0").exists() or job.process.poll() is not None, "the pool is ready")
        assert job.process.poll() is None, job.stdout + job.stderr
        ranks = ranks_of(job)
        assert len(ranks) == 3

        def idle() -> bool:
            """Over a while. In the first one a rank that had no request may still have been loading."""
            before, since = processor_s(ranks), time.monotonic()
            psutil.wait_procs(ranks, timeout=IDLE_S)  # none of them ends: this is the passing of time
            passed_s = time.monotonic() - since
            used = [now - then for now, then in zip(processor_s(ranks), before, strict=True)]
            print(f"processor seconds in {passed_s:.2f} s: {used}")
            return max(used) - TICK_S <= CPU_SHARE_MAX * passed_s

        until(idle, f"ranks that use at most {CPU_SHARE_MAX:.0%} of a processor each")
