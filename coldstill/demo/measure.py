"""What the students learned: held-out pairs come in, dense teacher against dense student, `measurements.json` goes out.

A process of its own (`python -m demo.measure OUTPUT [--quick]`), because here, and only here, the teacher is in memory
together with a student. The KL is the true one, over the whole vocabulary: one over the kept ids alone is a lower
bound and flatters.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .files import write_json
from .models import parameter_count
from .settings import FULL, LOSSES, MAX_TOKENS, QUICK, Layout, Size
from .text import read_rows
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS_PER_BATCH = 16


def batches(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`tokens int64 [B, T]`, padded on the right, and `learned bool [B, T]`: the assistant's tokens.

    Rows of similar length stand together; rows of more than `MAX_TOKENS` tokens are left out, as the capture does.
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


def target_logprobs(model: Any, tokens: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """`float32 [M, V]`: log of the full softmax at the positions whose NEXT token is learned."""
    hidden = model.model(tokens).last_hidden_state[:, :-1][learned[:, 1:]]
    return torch.log_softmax(model.lm_head(hidden).float(), dim=-1)


class StudentSums:
    """Sums over target positions of one student against the teacher."""

    def __init__(self) -> None:
        self.kl = self.cross_entropy = self.agreed = 0.0

    def add(self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor) -> None:
        """Take `teacher, student float32 [M, V]` (log-probs) and the tokens that follow, `labels int64 [M]`."""
        self.kl += (teacher.exp() * (teacher - student)).sum(1).double().sum().item()
        self.cross_entropy -= student.gather(1, labels[:, None]).double().sum().item()
        self.agreed += (teacher.argmax(1) == student.argmax(1)).sum().item()

    def means(self, targets: int) -> dict[str, float]:
        """Nats per target, and the share of targets at which both have the same favourite."""
        return {
            "kl_teacher_student": self.kl / targets,
            "cross_entropy": self.cross_entropy / targets,
            "top1_agreement": self.agreed / targets,
        }


class TeacherSums:
    """Sums over target positions of the teacher alone."""

    def __init__(self, *, top_k: int) -> None:
        self.top_k = top_k
        self.cross_entropy = self.entropy = self.tail = 0.0

    def add(self, teacher: torch.Tensor, labels: torch.Tensor) -> None:
        """Take `teacher float32 [M, V]` (log-probs) and `labels int64 [M]`."""
        self.cross_entropy -= teacher.gather(1, labels[:, None]).double().sum().item()
        self.entropy -= (teacher.exp() * teacher).sum(1).double().sum().item()
        self.tail += (1 - teacher.topk(self.top_k, dim=1).values.exp().double().sum(1)).sum().item()

    def means(self, targets: int) -> dict[str, float]:
        """Nats per target, and the mean mass outside the `top_k` most probable ids."""
        return {
            "cross_entropy": self.cross_entropy / targets,
            "entropy": self.entropy / targets,
            "mass_outside_top_k": self.tail / targets,
        }


@torch.inference_mode()
def measure(layout: Layout, size: Size) -> dict[str, Any]:
    """Measure the teacher, the student before distillation and after each of the three runs on held-out rows."""
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
    for tokens, learned in tqdm(list(batches(rows, load_tokenizer(layout.tokenizer))), desc="measuring", unit="batch"):
        labels = tokens[:, 1:][learned[:, 1:]]
        wanted = target_logprobs(teacher, tokens, learned)
        teacher_sums.add(wanted, labels)
        targets += len(labels)
        for name, student in students.items():
            sums[name].add(wanted, target_logprobs(student, tokens, learned), labels)
    return {
        "targets": targets,
        "teacher": {"parameters": parameter_count(teacher), **teacher_sums.means(targets)},
        "students": {
            name: {"parameters": parameter_count(students[name]), **sums[name].means(targets)} for name in students
        },
    }


def main() -> None:
    """Measure and write."""
    arguments = argparse.ArgumentParser(description="Measure the demo's students against its teacher.")
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    asked = arguments.parse_args()
    layout = Layout(asked.output)
    write_json(layout.measurements, measure(layout, QUICK if asked.quick else FULL))


if __name__ == "__main__":
    main()
