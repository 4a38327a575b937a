"""`kuberay_job.yaml` does what its comments and `docs/cluster.md` state, checked without a Kubernetes cluster."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.common.config_file import load_config
from coldstill.pipeline.config import CaptureConfig

REPOSITORY = Path(__file__).parent.parent
GUIDE = (REPOSITORY / "docs" / "cluster.md").read_text()


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "kuberay_job.yaml").read_text())


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_it_is_a_ray_job_of_the_locked_ray(job: dict[str, Any]) -> None:
    ray = re.search(r"^ray==(\S+)", (REPOSITORY / "requirements/gpu.txt").read_text(), re.MULTILINE)
    assert ray
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray[1]
    assert f"rayproject/ray:{ray[1]}-py311-gpu" in GUIDE


def test_its_command_is_one_that_coldstill_takes(job: dict[str, Any], tmp_path: Path) -> None:
    program, command, config, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("coldstill", "capture")
    here = tmp_path / "capture.yaml"
    here.write_text("{output: o, source: {path: s3://b/x.jsonl}, teacher: {model: m}}")
    settings = load_config(str(here), model=CaptureConfig, overrides=words)
    assert settings.output.startswith("s3://")
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert settings.cluster.max_workers == workers["maxReplicas"]
    assert workers["minReplicas"] == 0
    for pod in pods(job):
        (container,) = pod["containers"]
        assert any(config.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"])


def test_every_mount_has_its_volume_and_every_secret_and_map_is_made_in_the_guide(job: dict[str, Any]) -> None:
    made = set(re.findall(r"kubectl create (?:configmap|secret generic) (\S+)", GUIDE))
    used: set[str] = set()
    for pod in pods(job):
        volumes = {volume["name"] for volume in pod["volumes"]}
        used |= {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            used |= {source["secretRef"]["name"] for source in container["envFrom"]}
    assert used == made


def test_no_job_is_taken_without_the_token(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_head_does_no_work_and_each_worker_has_a_gpu_and_shared_memory(job: dict[str, Any]) -> None:
    head, *workers = pods(job)
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    for pod in workers:
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert int(resources["limits"]["nvidia.com/gpu"]) >= 1
        assert "/dev/shm" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


def test_the_guide_names_files_commands_and_settings_that_exist() -> None:
    for name in ("ray_cluster.yaml", "kuberay_job.yaml", "examples/qwen2.5_7b_capture.yaml"):
        assert name in GUIDE
        assert (REPOSITORY / name).exists()
    keys = set(re.findall(r"`cluster\.([a-z_]+)`", GUIDE))
    assert keys
    assert keys <= set(CaptureConfig.model_fields["cluster"].default_factory().model_dump())  # type: ignore[call-arg, misc]
