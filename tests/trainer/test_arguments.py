"""The length of a run, against simple counting; and each argument of transformers is honored or refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math

import pytest
from transformers import Trainer, TrainingArguments

from coldstill import DistillTrainer, load_logit_dataset
from coldstill.trainer.arguments import (
    UNSUPPORTED_FIELDS,
    UNSUPPORTED_PARAMETERS,
    adapt_arguments,
    rank_by_metric,
    validate_arguments,
    validate_optimizer,
)
from coldstill.trainer.errors import UnknownMetric, UnsupportedArgument
from coldstill.trainer.evaluation.report import EvaluationReport, measured_metrics
from tests.trainer.training import build


def words(text: str) -> list[str]:
    return text.split()


HONORED = words(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better full_determinism seed data_seed use_cpu accelerator_config dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics fsdp
    fsdp_config
    """
)

WITHOUT_EFFECT = {
    "dataloader_persistent_workers": "each loader is read once",
    "do_eval": "Trainer does not read it",
    "do_predict": "Trainer does not read it",
    "do_train": "Trainer does not read it",
    "eval_accumulation_steps": "evaluation keeps no predictions",
    "eval_do_concat_batches": "evaluation keeps no predictions",
    "eval_use_gather_object": "evaluation keeps no predictions",
    "ignore_data_skip": "a resumed run seeks its place and skips no batch",
    "label_names": "batches hold targets",
    "length_column_name": "train_sampling_strategy is refused",
    "liger_kernel_config": "use_liger_kernel is refused",
    "local_rank": "Trainer does not read it",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "remove_unused_columns": "a batch has no unused columns",
    "resume_from_checkpoint": "Trainer does not read it",
    "use_cache": "the student's configuration keeps its own",
}
"""Fields whose value cannot change a run, with the reason."""

OTHER_VALUES = {
    "auto_find_batch_size": True,
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "enable_jit_checkpoint": True,
    "fp16_full_eval": True,
    "include_for_metrics": ["loss"],
    "label_smoothing_factor": 0.1,
    "prediction_loss_only": True,
    "restore_callback_states_from_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
    "use_liger_kernel": True,
}


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulation"), [*itertools.product((0.3, 1, 2.5), (1, 7, 12), (1, 2, 5))]
)
def test_epochs_take_every_batch_once_in_whole_steps_and_a_last_one(tmp_path, epochs, batches, accumulation):
    args = arguments(tmp_path, num_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    changed, length = adapt_arguments(args, batches_per_epoch=batches, use_cache=True)
    taken = math.ceil(epochs * batches)
    steps = [list(range(taken))[start : start + accumulation] for start in range(0, taken, accumulation)]
    assert (length.micro_batches, length.steps, changed.max_steps) == (taken, len(steps), len(steps))
    assert length.epoch_after(len(steps)) == pytest.approx(taken / batches)


def test_max_steps_wins_over_epochs(tmp_path):
    args = arguments(tmp_path, max_steps=5, num_train_epochs=9, gradient_accumulation_steps=3)
    assert adapt_arguments(args, batches_per_epoch=4, use_cache=True)[1].micro_batches == 15


def test_the_user_s_own_arguments_stay_as_they_are(tmp_path):
    args = arguments(tmp_path, eval_strategy="epoch", logging_strategy="epoch", save_strategy="epoch")
    before = args.to_dict()
    changed, _ = adapt_arguments(args, batches_per_epoch=10, use_cache=False)
    assert args.to_dict() == before
    assert (changed.eval_strategy, changed.logging_strategy, changed.save_strategy) == ("steps",) * 3
    assert (changed.eval_steps, changed.logging_steps, changed.save_steps) == (10, 10, 10)
    assert not changed.logging_nan_inf_filter  # it would wait for the device at each micro-batch


def test_every_field_of_training_arguments_is_sorted_as_honored_refused_or_without_effect():
    """A field of a new release of transformers fails here: sort it, and refuse what has no effect."""
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    kinds = [set(HONORED), set(WITHOUT_EFFECT), set(UNSUPPORTED_FIELDS)]
    assert set().union(*kinds) >= known
    assert set().union(*kinds) - known <= {"group_by_length"}  # of earlier releases
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_a_field_that_cannot_be_honored_is_refused_with_its_reason(tmp_path, name, value):
    validate_arguments(arguments(tmp_path))
    with pytest.raises(UnsupportedArgument, match=name) as error:
        validate_arguments(arguments(tmp_path, **{name: value}))
    assert UNSUPPORTED_FIELDS[name] in str(error.value)


@pytest.mark.parametrize("name", sorted({*UNSUPPORTED_FIELDS} - {*OTHER_VALUES}))
def test_a_field_that_needs_other_packages_or_releases_is_refused_too(tmp_path, name):
    args = arguments(tmp_path)
    setattr(args, name, "set")
    with pytest.raises(UnsupportedArgument, match=name):
        validate_arguments(args)


@pytest.mark.parametrize(
    "config",
    [
        {"split_batches": True},
        {"dispatch_batches": True},
        {"even_batches": False},
        {"use_seedable_sampler": False},
        {"gradient_accumulation_kwargs": {"num_steps": 4}},
    ],
)
def test_accelerate_does_not_cut_the_batches(tmp_path, config):
    validate_arguments(arguments(tmp_path, accelerator_config={"non_blocking": True}))
    with pytest.raises(UnsupportedArgument, match="num_steps" if "num_steps" in str(config) else next(iter(config))):
        validate_arguments(arguments(tmp_path, accelerator_config=config))


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_an_optimizer_that_steps_within_the_backward_pass_is_refused(tmp_path, optim):
    with pytest.raises(UnsupportedArgument, match=optim):
        validate_arguments(arguments(tmp_path, optim=optim))


def test_an_optimizer_that_transformers_does_not_know_is_refused_with_the_nearest():
    validate_optimizer("adamw_torch_fused")
    with pytest.raises(UnsupportedArgument, match="use adamw_torch"):
        validate_optimizer("adam_torch")


def test_every_parameter_of_trainer_is_taken_or_refused_by_name(tiny_dataset, tiny_student, tmp_path):
    ours = set(inspect.signature(DistillTrainer.__init__).parameters) - {"unsupported"}
    theirs = set(inspect.signature(Trainer.__init__).parameters)
    assert theirs - ours == set(UNSUPPORTED_PARAMETERS) - {"tokenizer"}
    dataset = load_logit_dataset(tiny_dataset)
    for name, fix in UNSUPPORTED_PARAMETERS.items():
        with pytest.raises(UnsupportedArgument, match=name) as error:
            DistillTrainer(str(tiny_student), train_dataset=dataset, **{name: print})
        assert fix in str(error.value)
    with pytest.raises(TypeError, match="compute_metric"):
        DistillTrainer(str(tiny_student), train_dataset=dataset, compute_metric=print)


def test_a_delay_in_epochs_is_kept_in_steps(tmp_path):
    args = arguments(tmp_path, eval_strategy="epoch", eval_delay=2)
    assert adapt_arguments(args, batches_per_epoch=6, use_cache=True)[0].eval_delay == 12


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulation"), [*itertools.product((0.3, 1, 3, 2.5), (1, 6, 7), (1, 4))]
)
def test_an_epoch_ends_with_the_step_that_takes_its_last_batch(tmp_path, epochs, batches, accumulation):
    args = arguments(tmp_path, num_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    _, length = adapt_arguments(args, batches_per_epoch=batches, use_cache=True)
    step_of = [batch // accumulation + 1 for batch in range(length.micro_batches)]
    ends = {step_of[batch] for batch in range(batches - 1, length.micro_batches, batches)} | {length.steps}
    assert length.last_steps(0) == sorted(ends)
    assert length.last_steps(2) == sorted(step for step in ends if step > 2)


@pytest.mark.parametrize(
    ("scheduler", "warmup", "told"),
    [("constant", 0.1, True), ("constant", 0, False), ("constant_with_warmup", 0.1, False), ("cosine", 0.1, False)],
)
def test_a_warmup_that_the_scheduler_leaves_out_is_told(tmp_path, caplog, scheduler, warmup, told):
    args = arguments(tmp_path, lr_scheduler_type=scheduler, warmup_steps=warmup)
    with caplog.at_level("WARNING"):
        validate_arguments(args)
    assert ("constant_with_warmup" in caplog.text) is told


LOWER = words(
    """
    loss cross_entropy perplexity forward_kl_lower_bound reverse_kl_lower_bound forward_kl_estimate tail_kl_estimate
    soft_cross_entropy_estimate expected_calibration_error
    """
)
HIGHER = ["accuracy", "top1_agreement"]
NEITHER = words(
    """
    targets teacher_cross_entropy forward_kl_estimate_error confidence head_mass rest_mass tail_mass teacher_head_mass
    teacher_tail_mass
    """
)
OF_A_RESIDENT_TEACHER = words(
    """
    forward_kl reverse_kl cached_teacher_kl last_fifth_mass teacher_last_fifth_mass
    """
)


def test_every_metric_states_which_values_are_better_and_what_measuring_it_needs(tiny_dataset):
    wanted = {
        **dict.fromkeys(LOWER, "lower"), **dict.fromkeys(HIGHER, "higher"), **dict.fromkeys(NEITHER, None)
    }  # fmt: skip
    assert measured_metrics(None) == wanted
    assert {*wanted, *OF_A_RESIDENT_TEACHER, "calibration"} == {*EvaluationReport.model_fields, "loss"}
    found = measured_metrics(load_logit_dataset(tiny_dataset, draws=1))
    assert not {"forward_kl_estimate", "soft_cross_entropy_estimate"} & set(found)


def test_the_stated_metrics_are_those_that_an_evaluation_gives(tiny_dataset, tiny_student, tmp_path):
    for dataset in (load_logit_dataset(tiny_dataset), load_logit_dataset(tiny_dataset, draws=1)):
        trainer, _ = build(tiny_dataset, tiny_student, tmp_path, eval_dataset=dataset)
        others = {"eval_runtime", "eval_samples_per_second", "epoch"}
        assert set(trainer.evaluate()) - others == {f"eval_{name}" for name in measured_metrics(dataset)}


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize(
    ("name", "highest"), [*itertools.product(LOWER[:3], [False]), *itertools.product(HIGHER, [True])]
)
def test_the_metric_decides_which_value_is_best(tiny_dataset, tmp_path, name, highest, given):
    dataset = load_logit_dataset(tiny_dataset)
    for prefix, datasets in (("eval_", dataset), ("", dataset), ("eval_a_", {"a": dataset}), ("a_", {"a": dataset})):
        args = arguments(tmp_path, eval_strategy="epoch", metric_for_best_model=prefix + name, greater_is_better=given)
        before = args.greater_is_better
        assert rank_by_metric(args, datasets).greater_is_better is highest
        assert args.greater_is_better is before


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_the_metric_has_its_direction(tiny_dataset, tmp_path, scheduler):
    dataset = load_logit_dataset(tiny_dataset)
    for name, mode, other in (("accuracy", "max", "min"), ("cross_entropy", "min", "max")):
        given = {"eval_strategy": "epoch", "metric_for_best_model": name, "lr_scheduler_type": scheduler}
        assert rank_by_metric(arguments(tmp_path, **given), dataset).lr_scheduler_kwargs == {"mode": mode}
        wrong = arguments(tmp_path, **given, lr_scheduler_kwargs={"mode": other})
        with pytest.raises(UnsupportedArgument, match="mode"):
            rank_by_metric(wrong, dataset)


@pytest.mark.parametrize(
    ("name", "several", "nearest"),
    [
        ("eval_accuracies", False, "eval_accuracy"),
        ("cross_entropies", False, "eval_cross_entropy"),
        ("eval_loss", True, "eval_a_loss"),
        ("eval_forward_kl", False, "eval_forward_kl_"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_with_the_nearest(tiny_dataset, tmp_path, name, several, nearest):
    dataset = load_logit_dataset(tiny_dataset)
    args = arguments(tmp_path, eval_strategy="epoch", metric_for_best_model=name)
    with pytest.raises(UnknownMetric, match=f"to {nearest}"):
        rank_by_metric(args, {"a": dataset} if several else dataset)


def test_a_metric_of_a_run_without_evaluation_is_refused(tiny_dataset, tmp_path):
    args = arguments(tmp_path, metric_for_best_model="eval_loss")
    with pytest.raises(UnsupportedArgument, match="eval_strategy"):
        rank_by_metric(args, load_logit_dataset(tiny_dataset))
    with pytest.raises(UnsupportedArgument, match="eval_dataset"):
        rank_by_metric(arguments(tmp_path, metric_for_best_model="loss", eval_strategy="epoch"), None)
