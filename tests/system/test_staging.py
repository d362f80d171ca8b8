"""Staging between real hosts (network namespaces): who reads, what goes over which link, what is loaded."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.adapters import random_pair, write_adapter
from tests.hosts import cannot, hosts
from tests.launch import PATIENCE_S, ROOT, Launcher
from tests.system.runs import Run, prompts, write_lines

pytestmark = [
    pytest.mark.system, pytest.mark.mpi, pytest.mark.slow, pytest.mark.skipif(bool(cannot()), reason=cannot() or "-")
]  # fmt: skip

WATCH = """
import socket, sys
def watch(event, arguments):
    if event == "open" and arguments[0] == SOURCE:
        with open(LOG, "a") as file:
            file.write(socket.gethostname() + "\\n")
sys.addaudithook(watch)
"""


def watched(folder: Path, source: Path) -> tuple[str, Path]:
    """PYTHONPATH under which every process notes that it opens `source`, and where it notes it."""
    folder.mkdir()
    log = folder / "opened"
    (folder / "sitecustomize.py").write_text(f"SOURCE, LOG = {str(source)!r}, {str(log)!r}\n{WATCH}")
    return os.pathsep.join((str(folder), str(ROOT))), log


@pytest.mark.parametrize(
    ("mpirun", "count"), [("openmpi", 2), ("openmpi", 4), ("mpich", 2)], indirect=["mpirun"]
)  # fmt: skip
def test_model_reaches_every_host_and_is_read_once(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, count: int
) -> None:
    """Other hosts see an empty folder where model and adapter are, so what they load is the copy."""
    source = tmp_path / "far" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(tiny_model.read_bytes())
    size, digest = source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()
    adapter = write_adapter(source.with_name("adapter.gguf"), {"blk.0.attn_q.weight": random_pair(64, 64)})
    path, log = watched(tmp_path / "watch", source)
    requests = write_lines(tmp_path / "in.jsonl", prompts(8 * count, max_tokens=3))
    with hosts(count, tmp_path, hidden=dict.fromkeys(range(1, count), source.parent)) as made:
        options = (*made.options(), "-x", "PYTHONPATH") if mpirun.kind == "openmpi" else made.mpich_options()
        words = [str(mpirun.mpirun), *options, "-n", str(count), str(mpirun.python), "-m", "llmpi", "batch"]
        words += ["-m", str(source), "-i", str(requests), "-o", str(tmp_path / "run"), "--ctx", "64"]
        words += ["--slots", "2", "--stage", "always", "--stage-dir", str(tmp_path / "local"), "--coordinator-works"]
        words += ["--schedule", "round-robin", "--lora", f"{adapter}:0.5"]
        env = {**os.environ, **mpirun.env, "PYTHONPATH": path}
        before = [made.sent_bytes(name) for name in made.names]
        done = subprocess.run(
            made.command(words), env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        sent = [made.sent_bytes(name) - was for name, was in zip(made.names, before, strict=True)]
        assert done.returncode == 0, done.stderr + done.stdout
        copies = [
            made.local(name) / f"llmpi-{os.getuid()}" / "blobs" / f"sha256-{digest}" for name in made.names[1:]
        ]  # fmt: skip
        assert [hashlib.sha256(copy.read_bytes()).hexdigest() for copy in copies] == [digest] * (count - 1)
    session = Run(tmp_path / "run").about()["sessions"][-1]
    assert [worker["host"] for worker in session["workers"]] == list(made.names)
    told, also = session["staging"]
    assert (told["source_bytes_read"], told["nodes_staged"], told["nodes"]) == (size, count - 1, count)
    assert (also["role"], also["source_bytes_read"], also["nodes_staged"]) == (
        "adapter 0", adapter.stat().st_size, count - 1
    )  # fmt: skip
    # Rank 0's host loads the source itself, for it lies on the file system of the copies; no other host opens it.
    assert set(log.read_text().splitlines()) == {made.names[0]}
    # Each link carried the file once, whatever else was said: a reader that sent it to everyone would show.
    assert all(size <= one < 2 * size for one in sent[:-1]), (size, sent)
    assert sent[-1] < size
    Run(tmp_path / "run").check_whole([f"r{k}" for k in range(8 * count)])
    assert {line["llmpi"]["rank"] for line in Run(tmp_path / "run").record()} == set(range(count))


@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_a_host_without_room_ends_all_with_one_line(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "far" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(tiny_model.read_bytes())
    requests = write_lines(tmp_path / "in.jsonl", prompts(4, max_tokens=3))
    with hosts(2, tmp_path) as made:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", made.local(made.names[1])], check=True)
        try:
            words = [str(mpirun.mpirun), *made.options(), "-n", "2", str(mpirun.python), "-m", "llmpi", "batch", "-m"]
            words += [str(source), "-i", str(requests), "-o", str(tmp_path / "run"), "--stage", "always"]
            words += ["--stage-dir", str(tmp_path / "local")]
            env = {**os.environ, **mpirun.env, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                made.command(words), env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
        finally:
            subprocess.run(["umount", made.local(made.names[1])], check=True)
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("llmpi: ")]
    assert len(said) == 1, done.stderr + done.stdout
    assert f"cannot be staged on {made.names[1]}: " in said[0]
    assert "has room for 0.0 GB" in said[0]
    assert done.returncode != 0
