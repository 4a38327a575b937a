"""Measures the students against the teacher on held-out pairs and writes `measurements.json`.

`python -m coldstill.demo.measure OUTPUT [--quick]`. Only this stage loads the teacher and the students together. Its
KL is over the whole vocabulary: a KL over the kept ids is only a lower bound.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coldstill.common.files import write_json
from coldstill.common.progress import tqdm

from .models import load_tokenizer, parameter_count
from .settings import LOSSES, MAX_TOKENS, Layout, Size, size_of
from .text import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS_PER_BATCH = 16


def batches(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `tokens int64 [B, T]`, right-padded, and `loss_mask bool [B, T]`, which marks the assistant's tokens.

    A batch holds rows of similar length. Rows of more than `MAX_TOKENS` tokens are left out, as in the capture.
    """
    encoded = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = [
        (torch.tensor(ids), torch.tensor(mask, dtype=torch.bool))
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if len(ids) <= MAX_TOKENS
    ]
    pairs.sort(key=lambda pair: len(pair[0]))
    for start in range(0, len(pairs), ROWS_PER_BATCH):
        batch = pairs[start : start + ROWS_PER_BATCH]
        pad = torch.nn.utils.rnn.pad_sequence
        yield pad([ids for ids, _ in batch], batch_first=True), pad([mask for _, mask in batch], batch_first=True)


def target_logprobs(model: Any, tokens: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """`float32 [M, V]`: log-softmax over the vocabulary at the positions whose next token is in the loss mask."""
    hidden = model.model(tokens).last_hidden_state[:, :-1][loss_mask[:, 1:]]
    return torch.log_softmax(model.lm_head(hidden).float(), dim=-1)


class StudentSums:
    """Sums that compare one student with the teacher, over target positions."""

    def __init__(self) -> None:
        self.kl = self.cross_entropy = self.agreed = 0.0

    def add(self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor) -> None:
        """Add positions: `teacher` and `student float32 [M, V]` are log-probs, `labels int64 [M]` the next tokens."""
        self.kl += (teacher.exp() * (teacher - student)).sum(1).double().sum().item()
        self.cross_entropy -= student.gather(1, labels[:, None]).double().sum().item()
        self.agreed += (teacher.argmax(1) == student.argmax(1)).sum().item()

    def means(self, targets: int) -> dict[str, float]:
        """KL and cross-entropy in nats per target, and the share of targets with the same most probable token."""
        return {
            "kl_teacher_student": self.kl / targets,
            "cross_entropy": self.cross_entropy / targets,
            "top1_agreement": self.agreed / targets,
        }


class TeacherSums:
    """Sums for the teacher alone, over target positions."""

    def __init__(self, *, top_k: int) -> None:
        self.top_k = top_k
        self.cross_entropy = self.entropy = self.tail = 0.0

    def add(self, teacher: torch.Tensor, labels: torch.Tensor) -> None:
        """Add positions: `teacher float32 [M, V]` are log-probs, `labels int64 [M]` the next tokens."""
        self.cross_entropy -= teacher.gather(1, labels[:, None]).double().sum().item()
        self.entropy -= (teacher.exp() * teacher).sum(1).double().sum().item()
        self.tail += (1 - teacher.topk(self.top_k, dim=1).values.exp().double().sum(1)).sum().item()

    def means(self, targets: int) -> dict[str, float]:
        """Cross-entropy and entropy in nats per target, and the mean mass outside the `top_k` most probable ids."""
        return {
            "cross_entropy": self.cross_entropy / targets,
            "entropy": self.entropy / targets,
            "mass_outside_top_k": self.tail / targets,
        }


@torch.inference_mode()
def measure(layout: Layout, size: Size) -> dict[str, Any]:
    """Measure the teacher, the initial student and the three trained students on held-out rows."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    teacher = load(layout.teacher)
    students = {"before": load(layout.student), **{name: load(layout.run(name) / "student") for name in LOSSES}}
    teacher_sums = TeacherSums(top_k=size.top_k)
    sums = {name: StudentSums() for name in students}
    targets = 0
    rows = read_rows(layout.rows("held_out", "pairs"))
    encoded = list(batches(rows, load_tokenizer(layout.tokenizer)))
    for tokens, loss_mask in tqdm(encoded, desc="measuring", unit="batch"):
        labels = tokens[:, 1:][loss_mask[:, 1:]]
        expected = target_logprobs(teacher, tokens, loss_mask)
        teacher_sums.add(expected, labels)
        targets += len(labels)
        for name, student in students.items():
            sums[name].add(expected, target_logprobs(student, tokens, loss_mask), labels)
    return {
        "targets": targets,
        "teacher": {"parameters": parameter_count(teacher), **teacher_sums.means(targets)},
        "students": {
            name: {"parameters": parameter_count(students[name]), **sums[name].means(targets)} for name in students
        },
    }


def main() -> None:
    """Run the measurement and write its file."""
    arguments = argparse.ArgumentParser(description="Measure the demo's students against its teacher.")
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    layout = Layout(options.output)
    write_json(layout.measurements, measure(layout, size_of(quick=options.quick)))


if __name__ == "__main__":
    main()
