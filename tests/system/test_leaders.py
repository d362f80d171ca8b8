"""Leaders under real mpirun, on one host and on two (network namespaces): the same is done, in fewer messages."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import cannot, hosts
from tests.launch import ROOT, Launcher
from tests.system.runs import PATIENCE_S

pytestmark = [pytest.mark.system, pytest.mark.mpi, pytest.mark.slow]

BENCH = ("bench", "dispatch", "--json", "--peer-requests", 0, "--requests", 2_000, "--slots", 8)


def found(said: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return told


def answers(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]
    assert len(lines) == len({line["custom_id"] for line in lines}) == 2_000
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}


@pytest.mark.skipif(bool(cannot()), reason=cannot() or "-")
@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_sixteen_ranks_on_two_hosts_with_two_leaders_on_each(mpirun: Launcher, tmp_path: Path) -> None:
    with hosts(2, tmp_path) as made:
        words = [
            str(mpirun.mpirun),
            *made.options(8),
            "-n",
            "16",
            "-x",
            "PYTHONPATH",
            str(mpirun.python),
            "-m",
            "llmpi",
        ]
        words += [*map(str, BENCH), "--fanout", "4", "-o", str(tmp_path / "run")]
        done = subprocess.run(
            made.command(words), env={**os.environ, **mpirun.env, "TMPDIR": str(tmp_path)}, cwd=ROOT,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = found(done.stdout)
    assert (told["ranks"], told["leaders"]) == (16, 4)
    assert set(answers(tmp_path / "run").values()) == {"x" * 200}


def test_both_mpis_agree_on_leaders(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(5, *BENCH, "--fanout", 2, "-o", tmp_path / "run", timeout_s=PATIENCE_S)
    assert done.rc == 0, done.output
    assert found(done.stdout)["leaders"] == 2
    assert len(answers(tmp_path / "run")) == 2_000
