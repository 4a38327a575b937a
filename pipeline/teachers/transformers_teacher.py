"""The transformers engine: slow and plain, with exact tails and draws. For models that vLLM lacks, and as reference.

Shape letters: `T` tokens, `N` target positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from pipeline.config import SamplingConfig, TeacherConfig
from pipeline.errors import TeacherUnusable
from pipeline.sequences import TokenSequence
from storage_schema.header import DatasetHeader
from storage_schema.rows import TeacherTargets, span_positions

from .kernel import summarise
from .uniforms import draw_uniforms


class TransformersTeacher:
    """A causal language model of transformers. Takes and gives what `protocol.Teacher` says."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        self._config, self._header = config, header
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                config.model, revision=config.revision, dtype=config.dtype, **config.engine_args
            )
        except (ValueError, OSError) as error:
            raise TeacherUnusable(
                config.model, found=str(error).strip().splitlines()[0], wanted="a model that transformers loads"
            ) from error
        self._model = model.eval().to(self._device)

    @property
    def environment(self) -> dict[str, Any]:
        """See `protocol.Teacher`."""
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._device == "cuda" else "cpu",
        }

    def score(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        """See `protocol.Teacher`. One sequence at a time: its values do not depend on its neighbours."""
        return [self._score_one(sequence) for sequence in sequences]

    @torch.inference_mode()
    def _score_one(self, sequence: TokenSequence) -> TeacherTargets:
        positions = span_positions(sequence.target_spans)
        tokens = torch.from_numpy(sequence.token_ids.astype(np.int64)).to(self._device)
        wanted = torch.from_numpy(positions).to(self._device)
        # The head is applied at the wanted positions only: [1, N, V].
        logits = self._model(input_ids=tokens[None], logits_to_keep=wanted, use_cache=False).logits[0]
        uniforms = draw_uniforms(
            positions, draws=self._config.draws, seed=self._config.draw_seed, sample_id=sequence.sample_id
        )
        return summarise(
            logits,
            tokens[wanted + 1],
            uniforms,
            top_k=self._config.top_k,
            min_prob=self._config.min_prob,
            kept_draws=self._header.kept_draws,
            token_count=self._header.token_count,
        )
