"""The image as buildah builds it from the Dockerfile, and a job of two pods as the MPI Operator starts them: sshd in
each, the launcher's mpirun in a third, the manifest's own commands, nobody root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.containers.images import Builder, cannot, in_container
from tests.hosts import Hosts, hosts
from tests.hosts import cannot as cannot_make_hosts
from tests.launch import ROOT
from tests.system.runs import PATIENCE_S, Run, prompts, until, write_lines

WHY_NOT = cannot() or cannot_make_hosts()
pytestmark = [
    pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(WHY_NOT) and not os.environ.get("CI"), reason=WHY_NOT or "-"),
]  # fmt: skip

TAG = "llmpi"
USER = 1000
REQUESTS = 40


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    assert not WHY_NOT, WHY_NOT
    made = Builder(tmp_path_factory.mktemp("images"))
    wheels = ROOT / ".cache" / "wheels" / "default"
    wheels.mkdir(parents=True, exist_ok=True)
    try:
        made.make_base()
        made.build(TAG, wheels)
        yield made
    finally:
        made("umount", "--all")
        shutil.rmtree(made.folder, ignore_errors=True)  # more than a gigabyte


def image_environ(builder: Builder) -> dict[str, str]:
    """The variables that the image gives its processes."""
    config = json.loads(builder("inspect", "--type", "image", f"localhost/{TAG}"))["OCIv1"]["config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["llmpi"]
    return {"HOME": "/home/llmpi", **dict(variable.split("=", 1) for variable in config["Env"])}


def make_key(folder: Path) -> None:
    """What the operator puts into a Secret: a pair of keys that opens the pods of this job."""
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(folder / "id_rsa")], check=True)
    shutil.copy(folder / "id_rsa.pub", folder / "authorized_keys")
    give(folder)


def give(folder: Path) -> Path:
    """To the image's user, with all that is in it."""
    folder.mkdir(exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    return folder


@contextmanager
def worker_pod(made: Hosts, number: int, script: str) -> Iterator[None]:
    """A pod whose sshd answers, until the end of the block."""
    log = made.scratch / f"pod-{number}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(made.agent), made.addresses[number], script], stdout=file, stderr=file, start_new_session=True
        )
    try:
        until(lambda: process.poll() is not None or answers(made, number), "sshd answers")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def answers(made: Hosts, number: int) -> bool:
    probe = ["bash", "-c", f"exec 3<>/dev/tcp/{made.addresses[number]}/2222"]
    return subprocess.run(made.command(probe), capture_output=True, check=False).returncode == 0


def replica(role: str) -> Mapping[str, Any]:
    manifest = yaml.safe_load((ROOT / "containers/kubernetes/base/mpijob.yaml").read_text())
    (container,) = manifest["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]["containers"]
    return dict(container)


def test_a_job_of_two_pods(builder: Builder, tmp_path: Path, tiny_model: Path) -> None:
    data, keys, etc = (give(tmp_path / name) for name in ("data", "keys", "etc-mpi"))
    shutil.copy(tiny_model, data / "model.gguf")
    write_lines(data / "requests.jsonl", prompts(REQUESTS, max_tokens=8))
    make_key(keys)
    give(data)
    environ = image_environ(builder)
    mounts = {data: "/data", keys: "/home/llmpi/.ssh", etc: "/etc/mpi"}
    worker, launcher = replica("Worker"), replica("Launcher")
    with hosts(3, tmp_path / "hosts") as made, ExitStack() as stack:
        (etc / "hostfile").write_text("".join(f"{address} slots=2\n" for address in made.addresses[1:]))
        for number in (1, 2):
            tree = stack.enter_context(builder.tree(TAG))
            script = in_container(tree, mounts, environ, [*worker["command"], *worker["args"]])
            stack.enter_context(worker_pod(made, number, script))
        tree = stack.enter_context(builder.tree(TAG))
        script = in_container(tree, mounts, environ, ["llmpi", *launcher["args"]])
        command = [str(made.agent), made.addresses[0], script]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
    run = Run(data / "run")
    run.check_whole([f"r{number}" for number in range(REQUESTS)])
    assert {path.stat().st_uid for path in run.path.rglob("*")} == {USER}
    assert {worker["host"] for worker in run.about()["sessions"][0]["workers"]} == set(made.names[1:])
