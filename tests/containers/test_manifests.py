"""The Kubernetes manifests: pods by Kubernetes' own schemas, the MPIJob by the fields that its API has."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml

from tests.launch import ROOT

FOLDER = ROOT / "containers" / "kubernetes"
OVERLAYS = ["base", "gpu"]
pytestmark = pytest.mark.slow
Object = dict[str, Any]

# MPI Operator, API kubeflow.org/v2beta1: what a spec may hold, and the words that a field may be.
SPEC = {
    "slotsPerWorker", "runLauncherAsWorker", "runPolicy", "mpiReplicaSpecs", "sshAuthMountPath",
    "launcherCreationPolicy", "mpiImplementation",
}  # fmt: skip
RUN_POLICY = {
    "cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy", "suspend",
    "managedBy",
}  # fmt: skip
WORDS = {
    "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
    "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
}


def overlaid(folder: Path) -> list[Object]:
    """What kustomize would make of a folder: resources, images and JSON patches, which is all that ours use."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "images", "patches"}
    objects: list[Object] = []
    for resource in kustomization["resources"]:
        path = (folder / resource).resolve()
        objects += overlaid(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in kustomization.get("patches", []):
        for place, found in enumerate(objects):
            if found["kind"] == patch["target"]["kind"] and found["metadata"]["name"] == patch["target"]["name"]:
                objects[place] = jsonpatch.apply_patch(found, yaml.safe_load(patch["patch"]))
    for container in (each for found in objects if found["kind"] == "MPIJob" for each in containers(found)):
        name, _, tag = container["image"].partition(":")
        for image in kustomization.get("images", []):
            if image["name"] == name:
                container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
    # Anchors make equal parts one object; what is patched must not be.
    return json.loads(json.dumps(objects))  # type: ignore[no-any-return]


def templates(job: Object) -> dict[str, Object]:
    return {role: replica["template"] for role, replica in job["spec"]["mpiReplicaSpecs"].items()}


def containers(job: Object) -> list[Object]:
    return [container for template in templates(job).values() for container in template["spec"]["containers"]]


def the_job(objects: list[Object]) -> Object:
    (job,) = (found for found in objects if found["kind"] == "MPIJob")
    return job


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay: str) -> None:
    for found in overlaid(FOLDER / overlay):
        if found["kind"] != "MPIJob":
            kubernetes_validate.validate(found, "1.30", strict=True)
            continue
        for role, template in templates(found).items():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, "1.30", strict=True)


def test_the_pod_for_files_is_one() -> None:
    kubernetes_validate.validate(yaml.safe_load((FOLDER / "files.yaml").read_text()), "1.30", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_knows_every_field(overlay: str) -> None:
    job = the_job(overlaid(FOLDER / overlay))
    assert job["apiVersion"] == "kubeflow.org/v2beta1"
    assert set(job["spec"]) <= SPEC
    assert set(job["spec"]["runPolicy"]) <= RUN_POLICY
    assert set(job["spec"]["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    for replica in job["spec"]["mpiReplicaSpecs"].values():
        assert set(replica) <= {"replicas", "restartPolicy", "template"}
    for field, words in WORDS.items():
        assert job["spec"].get(field, next(iter(words))) in words


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_is_root_and_all_see_the_same_folders(overlay: str) -> None:
    job = the_job(overlaid(FOLDER / overlay))
    for template in templates(job).values():
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["terminationGracePeriodSeconds"] > 40, "a drain of 20 s must fit"
    mounts = [container["volumeMounts"] for container in containers(job)]
    assert mounts[0] == mounts[1]
    assert all(container["image"].count(":") == 1 for container in containers(job))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_models_are_staged_to_the_pods_own_disk_and_messages_have_room(overlay: str) -> None:
    job = the_job(overlaid(FOLDER / overlay))
    (launcher,) = templates(job)["Launcher"]["spec"]["containers"]
    (stage_dir,) = [word.partition("=")[2] for word in launcher["args"] if word.startswith("--stage-dir=")]
    (worker,) = templates(job)["Worker"]["spec"]["containers"]
    mounted = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in templates(job)["Worker"]["spec"]["volumes"]}
    assert volumes[mounted[stage_dir]]["emptyDir"] == {}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_a_gpu_for_each_rank() -> None:
    job = the_job(overlaid(FOLDER / "gpu"))
    (worker,) = templates(job)["Worker"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl; the other tests apply the overlays themselves")
    done = subprocess.run(
        [kubectl, "kustomize", str(FOLDER / overlay)], capture_output=True, text=True, check=True, timeout=120
    )
    assert sorted(yaml.safe_load_all(done.stdout), key=str) == sorted(overlaid(FOLDER / overlay), key=str)
