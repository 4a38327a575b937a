"""Your own teacher class as an engine: the mean of two checkpoints' distributions.

    teacher:
      model: my-org/checkpoint-a                # its tokenizer and config.json describe the dataset
      engine: custom_teacher:EnsembleTeacher    # a file in the folder that the capture starts from, or a package
      engine_args: {other: my-org/checkpoint-b, share: 0.5}

`coldstill.pipeline.teachers.protocol.Teacher` documents what a class must do. Shape letters: `T` tokens, `V` token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.protocol import ScoredSequence, Teacher, TokenSequence
from coldstill.pipeline.teachers.target_extractor import draw_uniforms, summarize, systematic_draws, uniform_count
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions


class EnsembleTeacher(Teacher):
    """`share` times the softmax of checkpoint `other`, and 1 - `share` times that of `teacher.model`."""

    tail = "exact"
    """Whole distributions are known here: exact tails, and `teacher.draws` may be above 0."""
    draw_method = "systematic"
    """How `summarize` makes the draws below."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        if sampling is not None:
            raise TeacherUnusable("EnsembleTeacher", found="mode generate", wanted="mode score or pretrain")
        self._header, self._scored = header, 0
        self._share = float(config.engine_args.get("share", 0.5))
        self._models = [self._load(name) for name in (config.model, config.engine_args["other"])]

    @property
    def environment(self) -> dict[str, Any]:
        """Stored in the commit record of each unit."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    @property
    def progress(self) -> int:
        """Sequences scored. Without it, the watchdog would take a long call for a hung one."""
        return self._scored

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """See `Teacher`."""
        return [ScoredSequence(sequence, self._targets(sequence)) for sequence in sequences]

    def _targets(self, sequence: TokenSequence) -> TeacherTargets:
        header, positions = self._header, span_positions(sequence.target_spans)
        tokens = torch.from_numpy(sequence.token_ids).long().to(self._models[0].device)
        own, other = (self._probs(model, tokens)[positions] for model in self._models)
        self._scored += 1
        uniforms = uniform_count(header.draws, draw_method=header.draw_method)
        return summarize(
            torch.lerp(own, other, self._share).log(),
            tokens[positions + 1],  # target position t holds the distribution of token t + 1
            draw_uniforms(positions, draws=uniforms, seed=header.draw_seed, sample_id=sequence.sample_id),
            top_k=header.top_k,
            min_prob=header.min_prob,
            kept_draws=header.kept_draws,
            token_count=header.token_count,
            draw_logprobs=header.draw_logprobs,
            systematic_draws=systematic_draws(header.draws, draw_method=header.draw_method),
        )

    def _probs(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """`float64 [T, V]`: without the padding columns of the head."""
        logits = model(tokens[None]).logits[0, :, : self._header.token_count]
        return torch.softmax(logits.double(), -1)

    def _load(self, name: str) -> Any:
        dtype = getattr(torch, self._header.teacher.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
