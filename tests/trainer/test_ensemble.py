"""Runs with several teachers: mixed by rows, or all on every row. Captures are real, of two tiny teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coldstill import load_logit_dataset
from coldstill.common.config_file import ConfigInvalid, check_config
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.manifest import seal
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import CheckpointMismatch, EnsembleMismatch, NoDraws, UnsupportedArgument
from coldstill.trainer.train import TrainSummary, train
from tests import making
from tests.pipeline.capturing import capture_config, do_units
from tests.trainer.ddp_run import train as train_here
from tests.trainer.test_ddp import run_ranks
from tests.trainer.training import KillAt, Killed, build, weights_of

SGD = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student and with the captures `one`, `two` (other K and draws), `plain` (no draws) and `long`,
    whose teacher has room for fewer tokens."""
    folder = tmp_path_factory.mktemp("several teachers")
    making.chat_model(folder / "student", seed=3)
    making.chat_model(folder / "other", seed=1)
    of_other = {"model": str(folder / "other"), "top_k": 6, "draws": 8, "draw_logprobs": True}
    for name, teacher in (
        ("one", {"draw_logprobs": True}),
        ("two", of_other),
        ("plain", {"draws": 0}),
        ("long", of_other | {"max_length": 75}),
    ):
        config = capture_config(folder, rows=24, output=name, teacher=teacher, calibration_targets=0)
        prepared = prepare(config)
        do_units(config)
        seal(prepared.store)
    return folder


def config_of(parts: Path, output: Path, **changes: Any) -> TrainConfig:
    document = {
        "output": str(output),
        "student": {"model": str(parts / "student")},
        "training": {"max_steps": 4, "batch_size": 4, "logging_steps": 1, "dataloader_workers": 0, "save_steps": 2},
        **changes,
    }
    return TrainConfig.model_validate(document)


def both(parts: Path, **more: Any) -> dict[str, Any]:
    return {"data": {"ensemble": [str(parts / "one"), str(parts / "two")], **more}}


def weights(output: Path) -> bytes:
    return (output / "student" / "model.safetensors").read_bytes()


def test_a_mixture_of_two_teachers_trains_and_card_and_summary_name_both(parts, tmp_path):
    paths = [str(parts / name) for name in ("one", "two")]
    summary = train(config_of(parts, tmp_path / "run", dataset=paths, data={"weights": [3, 1]}))
    ids = [open_dataset(path).dataset_id for path in paths]
    assert summary.dataset_ids == ids
    assert summary.teachers == [open_dataset(path).header.teacher.name for path in paths]
    assert len(set(summary.teachers)) == 2
    card = (tmp_path / "run/student/README.md").read_text()
    for fact in (*ids, *summary.teachers, "| share of the rows from each dataset | 0.75, 0.25 |"):
        assert fact in card


def test_an_ensemble_trains_and_card_and_summary_name_all_teachers(parts, tmp_path):
    summary = train(config_of(parts, tmp_path / "run", **both(parts, ensemble_weights=[1, 3])))
    headers = [open_dataset(parts / name).header for name in ("one", "two")]
    assert summary.teachers == [header.teacher.name for header in headers]
    assert summary.dataset_ids == [open_dataset(parts / name).dataset_id for name in ("one", "two")]
    assert TrainSummary.model_validate_json((tmp_path / "run/train_summary.json").read_text()) == summary
    card = (tmp_path / "run/student/README.md").read_text()
    for fact in (*summary.dataset_ids, *summary.teachers, "every row | 0.25, 0.75 |", "ensemble_weights"):
        assert fact in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["data"] == {"ensemble_weights": [1.0, 3.0]}  # no paths of this machine


@pytest.mark.parametrize("loss", ["taid", {"name": "taid", "tail": "mass_corrected"}, "dkd"], ids=str)
def test_a_dataset_with_itself_trains_like_the_dataset_alone(parts, tmp_path, loss):
    found = []
    for dataset in (
        load_logit_dataset(parts / "one"),
        load_logit_dataset(ensemble=[parts / "one"] * 2),
        load_logit_dataset(ensemble=[parts / "one"] * 3, ensemble_weights=[1, 2, 5]),
    ):
        trainer, gradients = build(dataset, parts / "student", tmp_path, loss=loss, max_steps=4, **SGD)
        trainer.train()
        found.append((gradients.steps, weights_of(trainer.model), trainer.record))
    for steps, trained, record in found[1:]:
        for mine, wanted in zip(steps, found[0][0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
        for name, weight in trained.items():
            torch.testing.assert_close(weight, found[0][1][name], rtol=1e-5, atol=1e-6)
        assert record.targets == found[0][2].targets
        if record.schedule is not None:
            assert record.schedule.t == pytest.approx(found[0][2].schedule.t, abs=1e-6)


@pytest.mark.parametrize("shape", [{}, {"pack_length": 160}, {"fused_head": False}], ids=str)
def test_the_gradient_is_the_weighted_sum_of_those_of_each_teacher(parts, tmp_path, shape):
    """Also that of a teacher without draws, whose tail is then one bucket."""
    names, shares = ("one", "two", "plain"), (0.5, 0.3, 0.2)
    loss = {"name": "forward_kl", "cross_entropy_share": 0.25}
    ways = [load_logit_dataset(parts / name) for name in names]
    ways.append(load_logit_dataset(ensemble=[parts / name for name in names], ensemble_weights=[5, 3, 2]))
    steps, logs = [], []
    for dataset in ways:
        model = making_double(parts / "student")
        trainer, gradients = build(dataset, model, tmp_path, loss=loss, max_steps=1, **SGD, **shape)
        trainer.train()
        steps.append(gradients.steps[0])
        logs.append(next(line for line in trainer.state.log_history if "loss" in line))
    wanted = sum(share * one for share, one in zip(shares, steps[:-1], strict=True))
    # float64, but for the norms of transformers, which compute in float32.
    torch.testing.assert_close(steps[-1], wanted, rtol=1e-5, atol=1e-8)
    for key in ("loss", "bucket_kl"):
        each = sum(share * log[key] for share, log in zip(shares, logs[:-1], strict=True))
        assert logs[-1][key] == pytest.approx(each, rel=1e-5)


def making_double(folder: Path) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_killed_and_started_again_it_ends_with_the_bytes_of_an_unbroken_run(parts, tmp_path):
    changes = both(parts) | {"loss": {"name": "taid", "tail": "mass_corrected"}}
    unbroken = train(config_of(parts, tmp_path / "unbroken", **changes))
    with pytest.raises(Killed):
        train(config_of(parts, tmp_path / "broken", **changes), callbacks=[KillAt(3)])
    assert train(config_of(parts, tmp_path / "broken", **changes)).taid_t == unbroken.taid_t
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")


def test_the_identity_of_a_run_holds_ids_and_weights_and_the_default_is_equal_weights(parts, tmp_path):
    output = tmp_path / "run"
    train(config_of(parts, output, **both(parts)))
    identity = json.loads((output / "run.json").read_text())
    assert identity["dataset_ids"] == [open_dataset(parts / name).dataset_id for name in ("one", "two")]
    assert identity["data"]["ensemble_weights"] == [0.5, 0.5]
    train(config_of(parts, output, **both(parts, ensemble_weights=[2, 2])))
    for other in (both(parts, ensemble_weights=[1, 2]), {"dataset": [str(parts / "one"), str(parts / "two")]}):
        with pytest.raises(CheckpointMismatch):
            train(config_of(parts, output, **other))
    train(config_of(parts, tmp_path / "alone", dataset=str(parts / "one")))
    assert "ensemble_weights" not in json.loads((tmp_path / "alone/run.json").read_text())["data"]


def test_held_out_rows_of_one_teacher_measure_a_student_of_several(parts, tmp_path):
    changes = both(parts) | {"eval_dataset": str(parts / "two")}
    training = {"max_steps": 2, "batch_size": 4, "eval_steps": 1, "best_metric": "eval_loss", "dataloader_workers": 0}
    assert train(config_of(parts, tmp_path / "run", **changes, training=training)).steps == 2


def test_held_out_rows_of_an_ensemble_are_measured_teacher_by_teacher(parts, tmp_path):
    ensemble = load_logit_dataset(ensemble=[parts / "one", parts / "two"])
    for given in (ensemble, {"both": ensemble}):
        with pytest.raises(UnsupportedArgument, match="an ensemble of 2 teachers"):
            build(parts / "one", making_double(parts / "student"), tmp_path, eval_dataset=given)
    trainer, _ = build(parts / "one", making_double(parts / "student"), tmp_path)
    with pytest.raises(UnsupportedArgument, match="by_teacher"):
        trainer.evaluate(ensemble)
    found = trainer.evaluate(dict(zip("ab", ensemble.by_teacher, strict=True)))
    for name, part in (("a", "one"), ("b", "two")):
        alone = trainer.evaluate(load_logit_dataset(parts / part))
        assert found[f"eval_{name}_forward_kl_lower_bound"] == alone["eval_forward_kl_lower_bound"]


def test_a_teacher_that_rejected_rows_is_refused_before_the_student_is_loaded(parts, tmp_path):
    data = {"ensemble": [str(parts / "one"), str(parts / "long")]}
    with pytest.raises(EnsembleMismatch, match="coldstill subset"):
        train(config_of(parts / "nothing", tmp_path / "run", data=data))


def test_a_loss_that_one_teacher_cannot_serve_is_a_named_error(parts, tmp_path):
    data = {"ensemble": [str(parts / "one"), str(parts / "plain")]}
    with pytest.raises(NoDraws):
        train(config_of(parts, tmp_path / "run", data=data, loss={"name": "taid", "tail": "mixture"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "exactly one of dataset and data.ensemble"),
        ({}, r"^train\.yaml: dataset\n +found: +nothing, and no data\.ensemble\n"),
        ({"dataset": "a", "data": {"ensemble": ["a", "b"]}}, "exactly one of dataset and data.ensemble"),
        ({"dataset": "a", "data": {"ensemble": ["a", "b"]}}, r"^train\.yaml: dataset\n +found: +a value beside"),
        ({"dataset": "a", "training": {"best_metric": "eval_loss"}}, r"^train\.yaml\n"),
        ({"data": {"ensemble": ["a"]}}, "data.ensemble"),
        ({"dataset": ["a", "b"], "data": {"ensemble_weights": [1, 1]}}, "data.ensemble_weights needs data.ensemble"),
        ({"data": {"ensemble": ["a", "b"], "weights": [1, 1]}}, "data.weights needs several datasets"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes, named):
    document = {"output": "o", "student": {"model": "s"}, **changes}
    with pytest.raises(ConfigInvalid, match=named):
        check_config(document, model=TrainConfig, where="train.yaml")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_that_accumulates(parts, tmp_path):
    paths = [parts / "one", parts / "two"]
    student = parts / "student"
    alone = train_here(load_logit_dataset(ensemble=paths), student, tmp_path, gradient_accumulation_steps=2)
    first, second = run_ranks(paths[0], student, tmp_path, "ensemble", str(paths[1]))
    assert [rows for pair in zip(first["rows"], second["rows"], strict=True) for rows in pair] == alone["rows"]
    assert first["schedule"] == second["schedule"]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(first["weights"][name], second["weights"][name], rtol=0, atol=0)
