"""Laws of a teacher of the user's own: how it is found, what is checked of its output, and whole captures with one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from coldstill.common.plugins import PluginNotFound
from coldstill.pipeline.capture import capture
from coldstill.pipeline.config import CaptureConfig, SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.answer_sampling import answer_sequence
from coldstill.pipeline.teachers.checkpoint import head_dtype_of
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    Teacher,
    TokenSequence,
    UnscoredSequence,
    non_finite,
    scored_of,
)
from coldstill.pipeline.teachers.target_extractor import summarize
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.commits import read_commit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import MediaReference, TeacherTargets, span_positions
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests import making
from tests.pipeline.capturing import capture_config, contents, do_units

HERE = "tests.pipeline.teachers.test_custom_teacher"
EXAMPLES = Path(__file__).parents[3] / "examples"
TOP_K = 4


class Uniform(Teacher):
    """Equal mass on all ids, and the lowest K kept. Answers a prompt with two tokens. `fault` damages its output."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        self._header, self._sampling = header, sampling
        self._fault = config.engine_args.get("fault")

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        if self._sampling is not None:
            answers = self._sampling.n
            sequences = [
                answer_sequence(prompt, [number, 1], number=number, answers=answers, finish_reason="stop")
                for prompt in sequences
                for number in range(answers)
            ]
        scored = [ScoredSequence(sequence, self._targets(sequence)) for sequence in sequences]
        return FAULTS[self._fault](scored) if self._fault else scored

    def _targets(self, sequence: TokenSequence) -> TeacherTargets:
        targets = TeacherTargets.empty(span_positions(sequence.target_spans).size, TOP_K)
        targets.ids[:] = np.arange(TOP_K)
        targets.logprobs[:] = targets.label_logprob[:] = -np.log(self._header.token_count)
        targets.counts[:] = TOP_K
        targets.log_tail[:] = np.log1p(-TOP_K / self._header.token_count)
        return targets


class DrawingUniform(Uniform):
    tail = "exact"


class DrawingSystematically(DrawingUniform):
    draw_method = "systematic"


class Nothing:
    def __init__(self, *arguments: object):
        pass


class Unlucky:
    def __init__(self, *arguments: object):
        raise KeyError("weights.bin")


def _last(**changes: Any) -> Callable[[list[ScoredSequence]], list[ScoredSequence]]:
    """The last one's targets changed; functions are called with what was there."""

    def change(scored: list[ScoredSequence]) -> list[ScoredSequence]:
        last = scored[-1]
        values = {
            name: value(getattr(last.targets, name)) if callable(value) else value for name, value in changes.items()
        }
        return [*scored[:-1], ScoredSequence(last.sequence, replace(last.targets, **values))]

    return change


def _last_sequence(**changes: Any) -> Callable[[list[ScoredSequence]], list[ScoredSequence]]:
    def change(scored: list[ScoredSequence]) -> list[ScoredSequence]:
        last = scored[-1].sequence
        values = {name: value(getattr(last, name)) for name, value in changes.items()}
        return [*scored[:-1], ScoredSequence(replace(last, **values), scored[-1].targets)]

    return change


FAULTS: dict[str, Callable[[Any], Any]] = {
    "a tuple": tuple,
    "one too few": lambda scored: scored[:-1],
    "targets alone": lambda scored: [item.targets for item in scored],
    "no targets": lambda scored: [ScoredSequence(item.sequence, None) for item in scored],  # type: ignore[arg-type]
    "other order": lambda scored: scored[::-1],
    "other tokens": _last_sequence(token_ids=lambda ids: ids + 1),
    "other spans": _last_sequence(target_spans=lambda spans: spans[:1] * [1, 0] + [0, 1]),
    "other source row": _last_sequence(source_row=lambda row: row + 1),
    "no images": _last_sequence(media=lambda media: ()),
    "a list of tokens": _last_sequence(token_ids=lambda ids: ids.tolist()),
    "no sequence": lambda scored: [ScoredSequence(item.sequence.sample_id, item.targets) for item in scored],  # type: ignore[arg-type]
    "new metadata": _last_sequence(metadata=lambda metadata: {"finish_reason": "stop", "own": 2}),
    "no finish reason": _last_sequence(metadata=lambda metadata: {}),
    "a position too few": lambda scored: [ScoredSequence(s, t.slice(0, t.positions - 1)) for s, t in scored],
    "K too small": _last(ids=lambda ids: ids[:, 1:], logprobs=lambda logprobs: logprobs[:, 1:]),
    "lists": _last(ids=lambda ids: ids.tolist()),
    "float64": _last(logprobs=lambda logprobs: logprobs.astype(np.float64)),
    "ids beyond the tokens": _last(ids=lambda ids: ids + 10**6),
    "an id twice": _last(ids=lambda ids: ids * 0),
    "mass above 1": _last(log_tail=lambda log_tail: log_tail * 0),
    "NaN": _last(label_logprob=lambda values: values * np.float32("nan")),
    "no finite logits": lambda scored: [non_finite(scored[0].sequence.sample_id, 0), *scored[1:]],
    "no finite logits of another row": lambda scored: [non_finite("b", 1), *scored[1:]],
    "no reason": lambda scored: [UnscoredSequence("a", 0, "because", ""), *scored[1:]],  # type: ignore[arg-type]
    "logits of NaN": lambda scored: [*scored[:-1], ScoredSequence(scored[-1].sequence, _of_logits(torch.nan))],
    "an infinite logit": lambda scored: [*scored[:-1], ScoredSequence(scored[-1].sequence, _of_logits(torch.inf))],
    "a label above the tail": _last(label_logprob=lambda values: values * 0),
    "a kept draw": _last(draw_ids=np.zeros(1, np.int32), draw_counts=np.array([1, 0, 0], np.int32)),
    "draws that were not wanted": _last(
        draw_ids=lambda ids: np.full(200, 9, np.int32), draw_counts=lambda counts: np.array([200, 0, 0], np.int32)
    ),
    "log-probs of draws": _last(draw_logprobs=np.empty(0, np.float32)),
}


def _of_logits(value: float) -> TeacherTargets:
    """Of three positions, the logits of the second hold `value`."""
    logits = torch.zeros(3, 258)
    logits[1, 9] = value
    return summarize(
        logits, torch.zeros(3, dtype=torch.int64), np.empty((3, 0)),
        top_k=TOP_K, min_prob=0.0, kept_draws=0, token_count=258,
    )  # fmt: skip


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> DatasetHeader:
    folder = making.chat_model(tmp_path_factory.mktemp("teacher"), padding=0)
    return making.tiny_header(folder, top_k=TOP_K, draws=0, tail="derived")


def _config(name: str = "Uniform", **changes: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": "m", "engine": f"{HERE}:{name}", "top_k": TOP_K, **changes})


def _load(header: DatasetHeader, fault: str | None = None, sampling: SamplingConfig | None = None) -> Teacher:
    return load_teacher(_config(engine_args={"fault": fault}), header, sampling)


def _sequences() -> list[TokenSequence]:
    return [
        TokenSequence(
            sample_id=name,
            source_row=row,
            token_ids=np.arange(4, dtype=np.int32) + 20 * row,
            target_spans=np.array([[0, 3]], np.int32),
        )
        for row, name in enumerate("ab")
    ]


def _prompts() -> list[TokenSequence]:
    return [replace(sequence, target_spans=np.empty((0, 2), np.int32)) for sequence in _sequences()]


def test_output_that_keeps_the_laws_comes_back_as_it_is(header: DatasetHeader) -> None:
    teacher = _load(header)
    scored = teacher.score(_sequences())
    assert [one.sequence.sample_id for one in scored] == ["a", "b"]
    assert [one.targets.positions for one in scored] == [3, 3]
    answers = _load(header, sampling=SamplingConfig(n=2)).score(_prompts())
    assert [one.sequence.sample_id for one in answers] == ["a#0", "a#1", "b#0", "b#1"]
    assert (teacher.environment, teacher.progress, teacher.processes) == ({"engine": f"{HERE}:Uniform"}, 0, ())


@pytest.mark.parametrize("sampling", [None, SamplingConfig()])
def test_a_row_keeps_its_metadata_beside_those_of_the_class(header: DatasetHeader, sampling: Any) -> None:
    given = [replace(one, metadata={"topic": 1}) for one in (_prompts() if sampling else _sequences())]
    last = scored_of(_load(header, "new metadata", sampling).score(given))[-1]
    assert last.row.metadata == {"topic": 1, "own": 2, "finish_reason": "stop"}


def test_a_class_draws_in_the_way_that_its_attribute_names() -> None:
    settings = {"model": "m", "draws": 4}
    for name, method, other in (
        ("DrawingUniform", "iid", "systematic"),
        ("DrawingSystematically", "systematic", "iid"),
    ):
        engine = {"engine": f"{HERE}:{name}"}
        assert TeacherConfig.model_validate({**settings, **engine}).draw_method == method
        assert TeacherConfig.model_validate({**settings, **engine, "draw_method": method}).draw_method == method
        with pytest.raises(ValidationError, match=f"draw_method {method}, not {other}(.|\n)*{name}"):
            TeacherConfig.model_validate({**settings, **engine, "draw_method": other})


@pytest.mark.parametrize(("fault", "row"), [("no finite logits", 0), ("logits of NaN", 1), ("an infinite logit", 1)])
def test_a_row_without_finite_logits_is_unscored_and_the_others_are_kept(
    header: DatasetHeader, fault: str, row: int
) -> None:
    results = _load(header, fault).score(_sequences())
    assert results[row] == non_finite("ab"[row], row)
    assert isinstance(results[1 - row], ScoredSequence)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("no finite logits of another row", "'b' of source row 1"),
        ("no reason", "because"),
        ("a tuple", "tuple"),
        ("one too few", "a list of 1"),
        ("targets alone", "TeacherTargets"),
        ("no targets", "NoneType"),
        ("no sequence", "str"),
        ("other order", "another sequence, 'b'"),
        ("other tokens", "another sequence"),
        ("other spans", "another sequence"),
        ("other source row", "another sequence"),
        ("a position too few", r"int32 \(2, 4\)"),
        ("K too small", r"ids(.|\n)*int32 \(3, 3\)(.|\n)*int32 \(3, 4\)"),
        ("lists", "list"),
        ("float64", "float64"),
        ("ids beyond the tokens", "1000000"),
        ("an id twice", "kept twice"),
        ("mass above 1", "mass of position"),
        ("NaN", "nan"),
        ("a label above the tail", "label_logprob"),
        ("draws that were not wanted", "200 draws(.|\n)*at most kept_draws, 0"),
        ("log-probs of draws", "draw_logprobs"),
    ],
)
def test_output_that_breaks_a_law_is_named_with_the_class_and_the_row(
    header: DatasetHeader, fault: str, what: str
) -> None:
    with pytest.raises(TeacherOutputInvalid, match=what) as caught:
        _load(header, fault).score(_sequences())
    assert f"{HERE}:Uniform" in caught.value.what


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("one too few", "a list of 3"),
        ("other order", "answer 'b#1' of source row 1"),
        ("a list of tokens", "token_ids(.|\n)*list"),
        ("other tokens", "another prompt"),
        ("other spans", "target spans"),
        ("other source row", "of source row 2"),
        ("no finish reason", "finish_reason None"),
    ],
)
def test_an_answer_that_breaks_a_law_is_named(header: DatasetHeader, fault: str, what: str) -> None:
    with pytest.raises(TeacherOutputInvalid, match=what):
        _load(header, fault, SamplingConfig(n=2)).score(_prompts())


@pytest.mark.parametrize("sampling", [None, SamplingConfig(n=2)])
def test_a_class_that_loses_the_images_of_a_row_is_named(
    header: DatasetHeader, sampling: SamplingConfig | None
) -> None:
    image = MediaReference(position=1, type="image/png", sha256=hashlib.sha256(b"x").hexdigest(), data=b"x")
    given = [replace(one, media=(image,)) for one in (_prompts() if sampling else _sequences())]
    assert all(one.row.media == (image,) for one in scored_of(_load(header, sampling=sampling).score(given)))
    with pytest.raises(TeacherOutputInvalid, match="0 images" if sampling else "another sequence"):
        _load(header, "no images", sampling).score(given)


def test_a_draw_of_a_kept_id_is_named(header: DatasetHeader) -> None:
    drawing = header.model_copy(update={"draws": 4, "kept_draws": 4, "tail": "exact"})
    with pytest.raises(TeacherOutputInvalid, match="tail draws only"):
        _load(drawing, "a kept draw").score(_sequences())


def test_an_answer_longer_than_a_row_may_be_is_named(header: DatasetHeader) -> None:
    short = header.model_copy(update={"max_length": 5})
    with pytest.raises(TeacherOutputInvalid, match=r"6 tokens(.|\n)*5\.\.5"):
        _load(short, sampling=SamplingConfig()).score(_prompts())


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        ("Absent", PluginNotFound, "no Absent"),
        ("Nothing", TeacherUnusable, "no environment, progress, processes, score"),
        ("Unlucky", TeacherUnusable, r"KeyError: 'weights\.bin'"),
    ],
)
def test_a_class_that_cannot_be_used_is_named(
    header: DatasetHeader, name: str, error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what):
        load_teacher(_config(name), header)


def test_an_engine_without_a_name_of_ours_and_without_a_module_is_refused() -> None:
    with pytest.raises(ValidationError, match="vllm, transformers, endpoint, or module:name"):
        TeacherConfig(model="m", engine="sglang")


def test_a_class_draws_only_if_it_declares_exact_tails() -> None:
    assert (_config().can_draw, _config("Nothing").can_draw, _config("DrawingUniform", draws=4).can_draw) == (
        False,
        False,
        True,
    )
    with pytest.raises(ValidationError, match="cannot draw"):
        _config(draws=4)


def test_logits_of_a_class_are_of_the_weights_data_type_unless_float32_is_asked_for() -> None:
    text = SimpleNamespace(dtype="torch.bfloat16")
    model: Any = SimpleNamespace(get_text_config=lambda: text, quantization_config=None)
    assert head_dtype_of(_config("DrawingUniform"), model) == "bfloat16"
    assert head_dtype_of(_config("DrawingUniform", head_dtype="float32"), model) == "float32"


def _ensemble(folder: Path, output: str = "dataset") -> CaptureConfig:
    if not (folder / "other").exists():
        making.chat_model(folder / "other", seed=9)
    engine = {"engine": "custom_teacher:EnsembleTeacher", "engine_args": {"other": str(folder / "other"), "share": 0.3}}
    return capture_config(folder, rows=12, output=output, teacher=engine, calibration_targets=0)


def _capture_in_process(config: CaptureConfig) -> None:
    store = prepare(config).store
    do_units(config)
    seal(store)


def test_a_capture_with_the_example_stores_the_mean_of_two_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    config = _ensemble(tmp_path)
    _capture_in_process(config)
    assert verify(config.output, deep=True, progress=False) == []
    dataset = open_dataset(config.output)
    assert (dataset.header.tail, dataset.header.draws) == ("exact", 4)
    environment = read_commit(Store(config.output), 0).environment
    assert environment["engine"] == "custom_teacher:EnsembleTeacher"
    assert environment["torch"] == torch.__version__
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("teacher", "other")
    ]
    drawn = 0
    for row in dataset.rows():
        tokens = torch.from_numpy(row.token_ids).long()
        logits = [model(tokens[None]).logits[0, :, : dataset.header.token_count].double() for model in models]
        own, other = (torch.softmax(each, -1).detach().numpy()[row.positions] for each in logits)
        mean = 0.7 * own + 0.3 * other
        wanted = np.log(mean[np.arange(row.positions.size), row.labels])
        np.testing.assert_allclose(row.targets.label_logprob, wanted, atol=0.3)  # half a step of the codec's grid
        np.testing.assert_allclose(np.exp(row.targets.log_tail), 1 - _kept_mass(mean, row.targets), atol=2e-3)
        drawn += row.targets.draw_ids.size
    assert drawn > 50


def _kept_mass(probs: np.ndarray, targets: TeacherTargets) -> np.ndarray:
    return np.where(targets.kept, np.take_along_axis(probs, targets.ids, 1), 0).sum(1)


@pytest.mark.slow
def test_a_capture_by_ray_finds_the_example_in_the_folder_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as in this process."""
    monkeypatch.chdir(EXAMPLES)
    summary = capture(_ensemble(tmp_path))
    assert (summary.rows, summary.rejected) == (12, 1)
    monkeypatch.syspath_prepend(EXAMPLES)
    _capture_in_process(_ensemble(tmp_path, output="in process"))
    assert contents(tmp_path / "dataset") == contents(tmp_path / "in process")
