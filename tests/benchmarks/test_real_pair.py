"""The benchmark of a real pair: its students, its dense objective, its figures, and which runs are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.held_out import held_out, student_figures, teacher_figures
from benchmarks.common.run_log import append
from benchmarks.common.whole_teacher import HiddenStates, head_of, last_hidden
from benchmarks.inputs import real_text
from benchmarks.inputs.cut_models import (
    blocks_of,
    kept_layers,
    load_model,
    make_toy,
    toy_model,
    train_on_text,
    write_student,
)
from benchmarks.real_pair import plan, stored_runs
from benchmarks.real_pair.dense_training import DenseObjective
from benchmarks.real_pair.plan import (
    CROSS_ENTROPY,
    DENSE,
    SIDES,
    TAID,
    Run,
    Size,
    Student,
    chosen_rate,
    planned,
    read_log,
    reported,
    shares,
)
from benchmarks.real_pair.runs import Bench
from coldstill.demo.text import ModuleFile
from coldstill.trainer.data.collate import collate
from coldstill.trainer.errors import VanishedGradient
from tests.benchmarks.making import rows

MAIN, CUT, SMALL = Student(8, healed=True), Student(8, healed=False), Student(6, healed=True)
SIZE = Size(
    rows={"train": 8, "validation": 2, "test": 2},
    rows_per_step=2,
    steps=4,
    students=(MAIN, CUT, SMALL),
    rates=(2e-4, 5e-4, 1e-3),
    seeds=3,
    healing_steps=2,
    healing_rate=1e-3,
)


def _run(side: str, rate: float, *, student: Student = MAIN, seed: int = 0) -> Run:
    return Run(student.layers, student.healed, side, rate, seed, SIZE.steps)


@pytest.mark.parametrize(("count", "wanted"), [(4, [0, 5, 11, 17]), (6, [0, 1, 5, 11, 16, 17]), (18, list(range(18)))])
def test_a_student_keeps_the_first_the_last_and_every_full_attention_layer(count: int, wanted: list[int]) -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert kept_layers(kinds, count) == wanted


@pytest.mark.parametrize("count", [3, 19])
def test_a_student_without_such_a_layer_or_with_more_than_the_teacher_has_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="keeps 4 to 18 layers"):
        kept_layers((["sliding_attention"] * 5 + ["full_attention"]) * 3, count)


def test_a_student_computes_what_its_teacher_computes_without_the_layers_it_lacks(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    teacher = toy_model(40).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "teacher")
    write_student(tmp_path / "teacher", tmp_path / "student", layers=4)
    student: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    tokens = torch.arange(80)[None] % 40
    with torch.no_grad():
        for layer in {0, 1, 2, 3, 4, 5} - set(kept_layers(teacher.config.layer_types, 4)):
            # Only the residual stream passes: both branches of the layer end in a product with 0.
            teacher.model.layers[layer].self_attn.o_proj.weight.zero_()
            teacher.model.layers[layer].mlp.down_proj.weight.zero_()
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_the_dense_objective_is_the_kl_of_the_interpolated_logits_and_its_gradient(t: float) -> None:
    targets = collate(rows(top_k=8))["targets"]
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(400, 12, generator=generator).double()
    hidden = torch.randn(targets.count, 12, generator=generator).double()
    logits = torch.randn(targets.count, 400, generator=generator).double().requires_grad_()
    target = ((1 - t) * logits.detach() + t * hidden @ head.T).softmax(1)
    wanted = (target * (target.log() - logits.log_softmax(1))).sum(1)
    wanted.sum().backward()

    objective, found = DenseObjective(head), logits.detach().clone()
    objective.begin(hidden)
    values = torch.cat(
        [
            objective.forward_backward_(found[start:stop], targets.part(start, stop), t=t, with_gradient=True).loss
            for start, stop in targets.borders(7)
        ]
    )
    torch.testing.assert_close(values, wanted.detach())
    torch.testing.assert_close(found, logits.grad)


def test_figures_of_a_student_are_those_of_the_whole_distributions(tmp_path: Path) -> None:
    vocabulary = 53
    teacher, student = toy_model(vocabulary).eval(), toy_model(vocabulary).eval()
    with torch.no_grad():
        for number, weight in enumerate((*teacher.parameters(), *student.parameters())):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    tokens = [torch.arange(3 * n, 3 * n + 20) * 7 % vocabulary for n in (1, 2)]
    positions = [torch.arange(19), torch.arange(4, 19)]
    states = HiddenStates(
        names=["a", "b"], tokens=tokens, positions=positions, hidden=last_hidden(teacher, tokens, positions, desc="")
    )
    part = held_out(states, head_of(teacher), path=tmp_path / "borders.pt")
    again = held_out(states, head_of(teacher), path=tmp_path / "borders.pt")
    found = student_figures(student, part)
    assert found == student_figures(student, again)

    def probs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [model(ids[None]).logits[0, at].double() for ids, at in zip(tokens, positions, strict=True)]
            ).softmax(1)

    p, q = probs(teacher), probs(student)
    order = p.argsort(dim=1, descending=True)
    labels = torch.cat([ids[at + 1] for ids, at in zip(tokens, positions, strict=True)])
    last = order[:, -11:]  # a fifth of 53, rounded up
    wanted = {
        "kl": (p * (p / q).log()).sum(1),
        "reverse_kl": (q * (q / p).log()).sum(1),
        "cross_entropy": -q[torch.arange(len(q)), labels].log(),
        "entropy": -(q * q.log()).sum(1),
        "top1_agreement": (order[:, 0] == q.argmax(1)).double(),
        "head_mass": q.gather(1, order[:, :10]).sum(1),
        "last_fifth_mass": q.gather(1, last).sum(1),
        "teacher_mass_on_head": p.gather(1, q.argsort(dim=1, descending=True)[:, :10]).sum(1),
    }
    assert found == pytest.approx({name: float(values.mean()) for name, values in wanted.items()}, abs=1e-5)
    of_teacher = teacher_figures(part, top_k=16)
    assert of_teacher["tail_mass"] == pytest.approx(float(p.gather(1, order[:, 16:]).sum(1).mean()), abs=1e-5)
    assert of_teacher["last_fifth_mass"] == pytest.approx(float(p.gather(1, last).sum(1).mean()), abs=1e-5)


def test_no_module_is_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [ModuleFile(name=f"m{n}.py", text=f"# module {n}\n" * 400) for n in range(60)]
    monkeypatch.setattr(real_text, "module_files", lambda: modules)
    paths = real_text.write_rows(tmp_path, {"train": 90, "validation": 6, "test": 6}, chats=False)
    read = {
        part: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for part, path in paths.items()
    }
    names = {part: {row["id"].split(":")[0] for row in found} for part, found in read.items()}
    assert {part: len(found) for part, found in read.items()} == {"train": 90, "validation": 6, "test": 6}
    assert not names["train"] & names["validation"]
    assert not (names["train"] | names["validation"]) & names["test"]


def test_a_student_is_healed_on_text_that_no_side_trains_on_and_keeps_its_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [ModuleFile(name=f"m{n}.py", text=f"x{n} = {n}\n" * 400) for n in range(60)]
    monkeypatch.setattr(real_text, "module_files", lambda: modules)
    counts = {"train": 40, "validation": 2, "test": 2, real_text.HEALING: 30}
    size = replace(SIZE, rows=counts, students=(Student(3, healed=True),), toy_steps=2, max_length=64)
    paths = real_text.write_rows(tmp_path / "rows", counts, chats=False)
    make_toy(tmp_path / "teacher", paths["train"], steps=2)
    bench = Bench(tmp_path, size)
    ids = {
        part: [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
        for part, path in paths.items()
    }
    assert {part: len(found) for part, found in ids.items()} == counts
    assert len({id_ for of_part in ids.values() for id_ in of_part}) == sum(counts.values())

    cut, healed = (load_model(bench.student(Student(3, healed))).state_dict() for healed in (False, True))
    assert torch.equal(cut["model.embed_tokens.weight"], healed["model.embed_tokens.weight"])
    assert not torch.equal(cut["model.layers.0.mlp.up_proj.weight"], healed["model.layers.0.mlp.up_proj.weight"])
    with monkeypatch.context() as broken:
        broken.setattr(Bench, "_heal", None)  # a second call makes none
        assert bench.student(Student(3, healed=True)).is_dir()


def test_training_on_text_lowers_the_cross_entropy_of_that_text() -> None:
    class Bytes:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    blocks = blocks_of(["abcd" * 20, "efgh" * 20], Bytes(), tokens=30)
    assert blocks.shape == (5, 30)
    assert bytes(blocks.flatten().tolist()) == ("abcd" * 20 + "efgh" * 20)[:150].encode()
    model = toy_model(128)
    with torch.no_grad():
        before = model(blocks, labels=blocks).loss
    train_on_text(model, blocks, steps=8, blocks_per_step=2, rate=3e-3, desc="")
    with torch.no_grad():
        assert model(blocks, labels=blocks).loss < before - 0.5


def _record(run: Run, *, validation: float = 1.0, test: float = 1.0) -> dict[str, Any]:
    return {**vars(run), "validation": {"kl": validation}, "test": {"kl": test}}


def test_a_second_start_runs_only_what_is_missing_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    assert read_log(log) == {}
    main, rates, students = 3, len(SIZE.rates), len(SIZE.students)
    everything = [run for run, _, _ in planned(SIDES, SIZE, {})]
    ready = [run for run, _, final in planned(SIDES, SIZE, {}) if final]
    assert [run.side for run in everything[:main]] == [side.name for side in SIDES if side.is_main]
    assert {run.student for run in everything[: (rates + 2) * main]} == {MAIN}
    # What waits for the rates: later orders of the main sides, and dense TAID.
    assert len(set(ready)) == len(ready) == rates * main + (len(SIDES) - main - 1) + (students - 1) * len(SIDES)
    log.write_text("".join(json.dumps(_record(run)) + "\n" for run in ready) + '{"layers": 8, "si', encoding="utf-8")
    done = read_log(log)
    append(log, _record(_run(DENSE.name, 1.0, student=SMALL)))
    assert len(read_log(log)) == len(done) + 1
    plan = [(run, final) for run, _, final in planned(SIDES, SIZE, done)]
    assert all(final for _, final in plan)
    assert len({run for run, _ in plan}) == len(plan) == len(everything)
    assert sum(run not in done for run, _ in plan) == 2 * main + 1


def test_the_learning_rate_is_chosen_on_the_validation_part_alone() -> None:
    runs = {rate: _run(TAID.name, rate) for rate in SIZE.rates}
    kls = {2e-4: (1.2, 0.9), 5e-4: (1.1, 1.3), 1e-3: (1.4, 0.8)}
    done = {runs[rate]: _record(runs[rate], validation=of[0], test=of[1]) for rate, of in kls.items()}
    assert chosen_rate(TAID, MAIN, SIZE, done) == (5e-4, True)
    assert [record["test"]["kl"] for record in reported(SIDES, SIZE, done)[MAIN][TAID.name]] == [1.3]
    del done[runs[5e-4]]
    assert chosen_rate(TAID, MAIN, SIZE, done) == (2e-4, False)
    assert chosen_rate(CROSS_ENTROPY, MAIN, SIZE, done) == (2e-4, False)
    assert chosen_rate(CROSS_ENTROPY, CUT, SIZE, done) == (2e-4, True)  # the first rate


def test_a_run_whose_gradient_vanished_is_done_but_has_no_part_in_choice_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(*_: Any) -> None:
        raise VanishedGradient("gradient", found="none", wanted="some", fix="wait")

    monkeypatch.setattr(Bench, "train", vanished)
    run = _run(TAID.name, 2e-4)
    (tmp_path / "runs" / run.folder).mkdir(parents=True)
    record = Bench(tmp_path, SIZE, engine="transformers").run(run, TAID)
    assert record["stopped"].startswith("VanishedGradient: gradient")
    assert not list((tmp_path / "runs").iterdir())
    append(tmp_path / "log", record, *(_record(_run(TAID.name, rate)) for rate in (5e-4, 1e-3)))
    done = read_log(tmp_path / "log")
    assert run in done
    assert chosen_rate(TAID, MAIN, SIZE, done) == (5e-4, True)
    assert reported(SIDES, SIZE, {run: record}) == {}


def test_dense_taid_takes_the_learning_rate_of_taid_from_the_cache() -> None:
    kls = {2e-4: 1.2, 5e-4: 1.4, 1e-3: 1.1}
    runs = {_run(TAID.name, rate): kl for rate, kl in kls.items()}
    done = {run: _record(run, validation=kl) for run, kl in runs.items()}
    of_dense = [run for run, side, _ in planned(SIDES, SIZE, done) if side == DENSE]
    assert of_dense == [_run(DENSE.name, 1e-3), *(_run(DENSE.name, 2e-4, student=student) for student in (CUT, SMALL))]
    assert DENSE.name not in reported(SIDES, SIZE, done)[MAIN]
    run = of_dense[0]
    assert reported(SIDES, SIZE, {**done, run: _record(run)})[MAIN][DENSE.name] == [_record(run)]


def test_a_share_is_taken_within_a_seed_and_only_where_both_ends_are_there() -> None:
    run = _run(CROSS_ENTROPY.name, 2e-4)
    of_sides = {
        CROSS_ENTROPY.name: [_record(run, test=2.0), _record(replace(run, seed=1), test=1.8)],
        DENSE.name: [_record(run, test=1.0)],
        "forward KL": [_record(run, test=1.1), _record(replace(run, seed=1), test=1.2)],
    }
    found = shares(of_sides, floor=CROSS_ENTROPY.name, dense=DENSE.name)
    assert found == {CROSS_ENTROPY.name: [0.0], DENSE.name: [1.0], "forward KL": [pytest.approx(0.9)]}


class _Bench(Bench):
    def facts(self) -> dict[str, Any]:
        return {"targets": 100, "top_k": 8, "bytes_per_target": 50.1}


def test_runs_of_the_stored_result_count_if_its_settings_and_its_cache_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = _run(DENSE.name, 2e-4), _run(TAID.name, 2e-4)
    result: dict[str, Any] = {
        "settings": plan.settings(SIZE),
        "facts": {"targets": 100, "top_k": 8, "bytes_per_target": 50.2},
        "log": [_record(run, test=0.5), _record(other)],
    }
    monkeypatch.setattr(stored_runs, "stored", lambda name: tmp_path / f"{name}.json")
    (tmp_path / "real_pair.json").write_text(json.dumps(result), encoding="utf-8")
    bench, log = _Bench(tmp_path, SIZE, engine="transformers"), tmp_path / plan.LOG
    append(log, _record(run, test=0.7))
    stored_runs.take_stored(bench)
    stored_runs.take_stored(bench)
    assert read_log(log) == {run: _record(run, test=0.7), other: _record(other)}
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2
    for part, changed in (("facts", {"top_k": 16}), ("settings", {"steps": 5})):
        (tmp_path / "real_pair.json").write_text(json.dumps({**result, part: {**result[part], **changed}}))
        with pytest.raises(ValueError, match=f"{part} differ .*start without --stored"):
            stored_runs.take_stored(bench)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quick_benchmark_trains_every_side_and_a_second_start_trains_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.real_pair", str(tmp_path)]
    environment = {"QUICK": "1"}

    def figures() -> dict[str, Any]:
        import os

        ended = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
        return json.loads(ended.stdout.splitlines()[-1])

    first = figures()
    assert first["runs"] == {"done": len(SIDES), "planned": len(SIDES)}
    (student,) = first["sides"]
    kls = {side: of["kl"][0] for side, of in first["sides"][student].items()}
    assert kls[DENSE.name] < kls[CROSS_ENTROPY.name] < first["before"][student]["kl"]
    assert figures()["log"] == first["log"]
