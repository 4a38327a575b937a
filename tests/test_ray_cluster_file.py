"""Ray's launcher accepts `ray_cluster.yaml`, and the file does what its comments state."""

from __future__ import annotations

import copy
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from coldstill.common.config_file import load_config
from coldstill.pipeline.config import CaptureConfig

REPOSITORY = Path(__file__).parent.parent
FILE = REPOSITORY / "ray_cluster.yaml"
GUIDE = (REPOSITORY / "docs" / "cluster.md").read_text()


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def workers(cluster: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def check_with_ray(cluster: dict[str, Any]) -> None:
    """Fill in defaults and check Ray's schema, as `ray up` does before it contacts the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    check_with_ray(cluster)


def test_ray_refuses_an_unknown_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        check_with_ray(cluster | {"idle_timeout": 5})


def test_the_head_is_on_demand_and_runs_no_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0


def test_every_worker_is_a_gpu_on_spot_that_scales_from_zero_and_back(
    cluster: dict[str, Any],
) -> None:
    assert workers(cluster)
    for name, kind in workers(cluster).items():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot", name
        assert kind["resources"]["GPU"] >= 1, name
        assert kind["min_workers"] == 0, name
        assert 1 <= kind["max_workers"] <= cluster["max_workers"], name
    assert cluster["idle_timeout_minutes"] > 0


def test_the_images_have_the_locked_ray_and_the_python_of_the_lock(cluster: dict[str, Any]) -> None:
    ray = re.search(r"^ray==(\S+)", (REPOSITORY / "requirements/gpu.txt").read_text(), re.MULTILINE)
    assert ray
    for image in ("head_image", "worker_image"):
        assert cluster["docker"][image].startswith(f"rayproject/ray:{ray[1]}-py311-")
    assert f"ray[default]=={ray[1]}" in FILE.read_text()


def test_every_node_has_the_token_and_refuses_to_run_without(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = (option.partition("RAY_AUTH_TOKEN_PATH=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option)
    assert cluster["file_mounts"][path] == "~/.ray/auth_token"


def test_the_nodes_install_this_folder_in_the_locked_versions(cluster: dict[str, Any]) -> None:
    (folder,) = (remote for remote, local in cluster["file_mounts"].items() if local == ".")
    (install,) = (command for command in cluster["setup_commands"] if "coldstill[" in command)
    assert re.search(rf'"{folder}\[capture\b[^"]*\]"', install)
    assert f"--constraint {folder}/requirements/gpu.txt" in install


def test_the_job_of_the_guide_names_no_file_by_a_path_that_depends_on_its_folder(cluster: dict[str, Any]) -> None:
    """A job starts in a folder of Ray's, so a relative path of an example's configuration leads nowhere."""
    (line,) = re.findall(r"ray job submit .*?-- (.*?)\n *```", GUIDE.replace("\\\n", " "), re.DOTALL)
    program, command, config, *overrides = shlex.split(line)
    assert (program, command) == ("coldstill", "capture")
    (folder,) = (remote for remote, local in cluster["file_mounts"].items() if local == ".")

    def here(path: str) -> Path:
        return REPOSITORY / Path(path).relative_to(folder)

    settings = load_config(str(here(config)), model=CaptureConfig, overrides=overrides)
    assert settings.source.chat_template is not None
    assert here(settings.source.chat_template).exists()
    assert settings.source.path is not None
    assert {path.partition("://")[0] for path in (settings.source.path, settings.output)} == {"s3"}


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("examples/*_capture.yaml")), ids=lambda path: path.stem)
def test_the_capture_of_the_guide_by_a_server_takes_the_examples(path: Path) -> None:
    (words,) = re.findall(r"coldstill capture CONFIG.yaml (.*teacher.engine=endpoint.*)$", GUIDE, re.MULTILINE)
    assert load_config(str(path), model=CaptureConfig, overrides=words.split()).teacher.engine == "endpoint"


def test_the_image_of_the_guide_can_build_the_folder_that_it_copies() -> None:
    """setuptools writes beside pyproject.toml, and Ray's image runs as the user `ray`."""
    (copied,) = re.findall(r"^COPY (.*)$", GUIDE, re.MULTILINE)
    assert "--chown=ray" in copied.split()


def test_every_choice_has_its_reason_above_it() -> None:
    lines = FILE.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"[a-z_]+:", line)]
    assert [lines[number] for number in keys if not lines[number - 1].startswith("#")] == []


def test_the_outputs_of_commands_are_not_sent_to_the_nodes_and_the_package_is(
    cluster: dict[str, Any],
) -> None:
    """`ray up` sends the clone to each node: a demo, and the models of a benchmark, have gigabytes."""
    names = [part.strip("/") for part in (REPOSITORY / ".gitignore").read_text().split()]
    outputs = [name for name in names if name.endswith("_output") or name.startswith("bench_")]
    assert len(outputs) > 8

    def is_left_out(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in cluster["rsync_exclude"])

    assert [name for name in outputs if not is_left_out(name)] == []
    assert not any(is_left_out(name) for name in ("benchmarks", "coldstill", "pipeline", "storage_schema", "trainer"))
