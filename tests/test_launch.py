"""The files of `examples/launch` have only keys and options that their launchers document, and resume as they state."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.common.config_file import load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.trainer.config import TrainConfig

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "examples" / "launch"
GUIDE = (REPOSITORY / "docs" / "launch.md").read_text()
SKYPILOT = sorted(FOLDER.glob("skypilot_*.yaml"))
SLURM = sorted(FOLDER.glob("slurm_*.sbatch"))
SETTINGS = {"capture": CaptureConfig, "train": TrainConfig}

SKYPILOT_KEYS = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config"},
    "resources": {
        *("infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size"),
        *("disk_tier", "network_tier", "image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery"),
    },
    "job_recovery": {"strategy", "max_restarts_on_errors"},
}
"""The keys that docs.skypilot.co/en/latest/reference/yaml-spec.html documents, by section."""

SBATCH_OPTIONS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "output", "open-mode"),
    *("requeue", "signal", "exclusive"),
}
"""Those of slurm.schedmd.com/sbatch.html that the scripts use."""


def task(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def coldstill_words(script: str) -> list[str]:
    """The words after the program in the line of a script that runs `coldstill`."""
    line = re.search(r"^\s*(?:srun .*|\S*/bin/)?\bcoldstill (?:capture|train) .*", script.replace("\\\n", " "), re.M)
    assert line
    words = shlex.split(line[0].split("||")[0])
    return words[next(place for place, word in enumerate(words) if word in SETTINGS) :]


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.stem)
def test_a_skypilot_task_has_only_documented_keys_and_recovers(path: Path) -> None:
    found = task(path)
    assert found.keys() <= SKYPILOT_KEYS[""]
    assert found["resources"].keys() <= SKYPILOT_KEYS["resources"]
    recovery = found["resources"]["job_recovery"]
    assert recovery.keys() <= SKYPILOT_KEYS["job_recovery"]
    assert recovery["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert found["resources"]["use_spot"] is True


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.stem)
def test_a_skypilot_task_runs_a_command_that_coldstill_takes(path: Path) -> None:
    found = task(path)
    variables = found["envs"] | {"SKYPILOT_NUM_GPUS_PER_NODE": "4", "HOME": "home", "PATH": "path"}
    script = re.sub(r"\$\{?(\w+)\}?", lambda match: variables[match[1]], found["run"].replace("$!", "1"))
    command, config, *overrides = coldstill_words(script)
    settings = load_config(str(REPOSITORY / config), model=SETTINGS[command], overrides=overrides)
    assert (settings.output if command == "capture" else settings.dataset).startswith("s3://")


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.stem)
@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_scripts_of_a_skypilot_task_parse(path: Path, part: str) -> None:
    done = subprocess.run(["bash", "-n"], input=task(path)[part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def calls_of_training(tmp_path: Path, programs: dict[str, str]) -> list[str]:
    """What the task of a training does with these programs: arguments of `aws`, in order."""
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"CALLS": str(tmp_path / "calls"), "RUN": "s3://b/run", "CONFIG": "c", "DATASET": "d"}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = task(FOLDER / "skypilot_train.yaml")["run"]
    done = subprocess.run(["bash", "-c", script], env=os.environ | variables, cwd=tmp_path, timeout=20)
    assert done.returncode == 0
    return [line.replace("s3 sync --only-show-errors ", "") for line in (tmp_path / "calls").read_text().splitlines()]


def test_a_training_on_a_lost_machine_is_copied_on_after_a_copy_that_failed(tmp_path: Path) -> None:
    """A file that the training removes during a copy fails that copy, and no later one."""
    programs = {
        "aws": 'echo "$@" >>"$CALLS"; test "$(wc -l <"$CALLS")" -ne 2',
        "sleep": f"exec {shutil.which('sleep')} 0.02",
        "coldstill": f'mkdir run; while test "$(wc -l <"$CALLS")" -lt 5; do {shutil.which("sleep")} 0.02; done',
    }
    calls = calls_of_training(tmp_path, programs)
    assert calls[:4] == ["s3://b/run run", "links s3://b/run", "links s3://b/run", "--delete links s3://b/run"]
    assert calls[-1] == "--delete run s3://b/run"


@pytest.mark.parametrize("running", ["errors links s3", "--delete links s3"])
def test_the_last_copy_of_a_training_waits_for_one_that_runs(tmp_path: Path, running: str) -> None:
    """A copy of an earlier moment that ends after the last one would delete the student in the bucket."""
    sleep = shutil.which("sleep")
    programs = {
        "aws": f'echo start "$@" >>"$CALLS"; [[ "$@" != *"{running}"* ]] || {sleep} 0.3; echo end "$@" >>"$CALLS"',
        "sleep": f"exec {sleep} 0.02",
        "coldstill": f'mkdir run; until grep -q -- "{running}" "$CALLS"; do {sleep} 0.02; done',
    }
    calls = calls_of_training(tmp_path, programs)
    assert calls[-2:] == ["start --delete run s3://b/run", "end --delete run s3://b/run"]
    assert calls[-4].split()[1:] == calls[-3].split()[1:]  # its start and its end


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_a_slurm_script_passes_the_linter_and_has_only_documented_options(path: Path) -> None:
    options = re.findall(r"^#SBATCH --([\w-]+)", path.read_text(), re.MULTILINE)
    assert {"requeue", "signal", "open-mode"} <= set(options) <= SBATCH_OPTIONS
    assert len(options) == path.read_text().count("#SBATCH")
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    linter = Path(sys.executable).with_name("shellcheck")
    if linter.exists():
        done = subprocess.run([linter, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_what_a_slurm_script_adds_to_the_command_is_what_coldstill_takes(path: Path) -> None:
    command, _, *overrides = coldstill_words(path.read_text().replace("$workers", "16"))
    config = {"capture": "qwen2.5_7b_capture.yaml", "train": "qwen2.5_0.5b_train.yaml"}[command]
    load_config(str(REPOSITORY / "examples" / config), model=SETTINGS[command], overrides=overrides)


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder of programs that record their arguments; `srun` exits with $CODE, and a job has the state $STATE."""
    programs = {"srun": "exit $CODE", "squeue": "echo $STATE", "scontrol": "echo node-1", "ray": ""}
    for name, line in programs.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho {name} "$@" >>"$CALLS"\n{line}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    activate = tmp_path / "environment" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    return tmp_path


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("code", "state", "queued_again"),
    [(0, "RUNNING", False), (143, "RUNNING", True), (143, "COMPLETING", False), (1, "RUNNING", False)],
    ids=["finished", "time limit", "canceled", "error"],
)
def test_a_job_is_queued_again_at_its_time_limit_only(
    slurm: Path, path: Path, code: int, state: str, queued_again: bool
) -> None:
    variables = {"CODE": str(code), "STATE": state, "CALLS": str(slurm / "calls"), "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    variables |= {"PATH": f"{slurm}:{os.environ['PATH']}", "COLDSTILL_ENV": str(slurm / "environment")}
    done = subprocess.run(["bash", path, "CONFIG.yaml", "a=b"], env=os.environ | variables, capture_output=True)
    calls = (slurm / "calls").read_text().splitlines()
    assert done.returncode == code
    assert ("scontrol requeue 7" in calls) == queued_again
    (started,) = (line for line in calls if line.startswith("srun "))
    assert "CONFIG.yaml a=b" in started
    if "capture" in path.stem:
        assert started.endswith("cluster.max_workers=16 cluster.driver_dead_after_s=60")


def test_the_kubernetes_training_has_time_to_save_and_starts_again() -> None:
    job = task(FOLDER / "kubernetes_train.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert job["spec"]["backoffLimit"] > 0
    grace = TrainConfig.model_fields["training"].default_factory().grace_s  # type: ignore[call-arg, misc]
    assert pod["terminationGracePeriodSeconds"] > 2 * grace
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    command, config, *overrides = container["args"]
    config = config.replace("/opt/coldstill", str(REPOSITORY))
    settings = load_config(config, model=SETTINGS[command], overrides=overrides)
    assert settings.output.startswith(mounts["data"] + "/")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_guide_names_every_file_and_no_other() -> None:
    here = {path.name for path in FOLDER.iterdir()}
    assert set(re.findall(r"`([\w.]+\.(?:ya?ml|sbatch))`", GUIDE)) - {"CONFIG.yaml"} == here
    assert all(path.exists() for path in FOLDER.iterdir()), "also the files behind links"
