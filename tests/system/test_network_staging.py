"""`--stage auto` where the model lies on a real network file system, which each host has mounted for itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import hosts as namespaces
from tests import network_mounts
from tests.launch import ROOT, Launcher
from tests.network_mounts import network_mount
from tests.system.runs import Run, prompts, write_lines

pytestmark = [pytest.mark.system, pytest.mark.mpi, pytest.mark.slow]

HOSTS = 3


@pytest.mark.skipif(bool(namespaces.cannot()), reason=namespaces.cannot() or "-")
@pytest.mark.parametrize("mpirun", ["openmpi"], indirect=True)
def test_a_model_on_a_network_file_system_is_read_once_for_all_hosts_and_a_local_one_is_left_where_it_is(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path
) -> None:
    """Each host's mount has a server of its own, so what each of them fetches is counted, and no cache is shared."""
    network_mounts.require()
    server, seen = tmp_path / "server", tmp_path / "seen"
    server.mkdir()
    seen.mkdir()
    shutil.copy(tiny_model, server / "model.gguf")
    size = tiny_model.stat().st_size
    requests = write_lines(tmp_path / "in.jsonl", prompts(4 * HOSTS, max_tokens=3))
    with ExitStack() as stack:
        mounts = [stack.enter_context(network_mount(server, tmp_path / f"seen-{host}")) for host in range(HOSTS)]
        bound = {host: (mount.point, seen) for host, mount in enumerate(mounts)}
        made = stack.enter_context(namespaces.hosts(HOSTS, tmp_path, bound=bound))

        def batch(model: Path, run: str, *options: str) -> tuple[str, list[int]]:
            words = [str(mpirun.mpirun), *made.options(), "-x", "PYTHONPATH", "-x", "TMPDIR", "-n", str(HOSTS)]
            words += [str(mpirun.python), "-m", "llmpi", "batch", "-m", str(model), "-i", str(requests)]
            words += ["-o", str(tmp_path / run), "--ctx", "64", "--slots", "2", "--coordinator-works"]
            words += ["--schedule", "round-robin", *options]
            env = {**os.environ, **mpirun.env, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "local")}
            before = [mount.sent_bytes() for mount in mounts]
            done = subprocess.run(
                made.command(words), env=env, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
            )
            assert done.returncode == 0, done.stderr + done.stdout
            Run(tmp_path / run).check_whole([f"r{k}" for k in range(4 * HOSTS)])
            return done.stderr, [mount.sent_bytes() - was for mount, was in zip(mounts, before, strict=True)]

        far = seen / "model.gguf"
        said, sent = batch(far, "auto")
        assert "read once" in said
        (told,) = Run(tmp_path / "auto").about()["sessions"][-1]["staging"]
        assert (told["source_bytes_read"], told["nodes_staged"], told["nodes"]) == (size, HOSTS, HOSTS)
        assert Run(tmp_path / "auto").about()["details"]["model"] == str(far)  # the copies may be gone for a replay
        # The reader looks at the file's header as well, before it is staged; the others never open it.
        assert size <= sent[0] < 1.5 * size, (size, sent)
        assert all(one < 0.2 * size for one in sent[1:]), (size, sent)
        copies = [list((made.local(name) / f"llmpi-{os.getuid()}" / "blobs").iterdir()) for name in made.names]
        assert [[copy.read_bytes() == tiny_model.read_bytes() for copy in found] for found in copies] == [
            [True]
        ] * HOSTS

        # Without staging each host fetches it for itself: this counting can tell.
        _said, sent = batch(far, "never", "--stage", "never")
        assert all(one >= 0.8 * size for one in sent[1:]), (size, sent)

        said, sent = batch(tiny_model, "near")
        assert "staged" not in said
        assert not Run(tmp_path / "near").about()["sessions"][-1].get("staging")
        assert all(one < 0.2 * size for one in sent), (size, sent)
