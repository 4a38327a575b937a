"""The self-check: compares the tap's log-probs with those of vLLM's public path, at each engine start.

Both score six sequences of random tokens, and one with an image if the teacher sees images; the tap scores them
together, alone and in reverse order. The engine is not used if the two differ by more than their arithmetic explains.
Each limit is derived, none is measured on a model.
Letters: `u` = 2^-24, the unit roundoff of float32; `r` that of the logits' type; `W` width of the hidden states, `V`
vocabulary, `Z` largest size of a logit, among those within 50 nats of their row's best.

- **A logit** is a sum of `W` products, added in float32 in an order that depends on the block, then rounded to the
  logits' type. The tap joins rows of several requests into blocks, the public path does not. Each addition rounds a
  partial sum of size at most `Z`, and the roundings are independent, so the standard deviation is at most `sqrt(W) u Z`
  (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). With six of them, for two paths, a logit differs by at most
  `g = 2 (6 sqrt(W) u + r) Z`, plus the rounding of stored log-probs, `4 u (2 Z + log V)`.
- **KL** between two softmaxes whose logits differ by at most `g` is at most `g^2 / 2` (Hoeffding's lemma). It holds for
  the softmax over the kept ids alone, where an error of the normalizer cancels. So this limit finds another
  temperature, scale or cap even at a large vocabulary.
- **A log-prob** differs by at most `2 g` and the error of the normalizer. The public path sums `V` terms in float32,
  and torch splits them over 4 partial sums or more: at most `V u / 4`. A term that is much smaller than its partial sum
  is lost, so these errors have one sign, and no square root applies. (Gemma 3 270M, V = 262,144: 8.5e-5 measured, and
  up to 3.9e-3 possible.) This limit finds a softmax over a cut vocabulary.
- **The engine's own differences**, which a body in half precision or another schedule causes: the largest between two
  runs of the public path, over other orders and over prefixes, whose matrix products have other shapes. Twice that is
  added to each limit (to the square root of the KL, which grows with the square of a difference).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.checkpoint import TRIES, Score, random_sequences, require_finite
from coldstill.pipeline.teachers.image_expansion import ImageRules
from coldstill.pipeline.teachers.image_probe import image_probe
from coldstill.pipeline.teachers.protocol import ScoreResult, TokenSequence, UnscoredSequence, scored_of
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets

from .scoring import NEGLIGIBLE_NATS

_LENGTHS = (2, 16, 17, 96, 64, 200)
"""Tokens of each sequence."""
_PREFIXES = ((0, 5), (2, 5), (4, 3))
"""Pairs of sequences of which the first is a prefix of the second, up to 64 tokens; a prefix cache would find them."""
_SHARED_TOKENS = 64
_UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_STANDARD_DEVIATIONS = 6
_PARTIAL_SUMS = 4


class Arithmetic(NamedTuple):
    """What the limits depend on; see the head of this file."""

    width: int
    vocab_size: int
    largest_logit: float
    head_dtype: str

    @property
    def _relative(self) -> float:
        rounding = _UNIT_ROUNDOFF.get(self.head_dtype, _UNIT_ROUNDOFF["bfloat16"])
        return 2 * (_STANDARD_DEVIATIONS * math.sqrt(self.width) * _UNIT_ROUNDOFF["float32"] + rounding)

    @property
    def logit(self) -> float:
        """Largest difference of a logit."""
        stored = 4 * _UNIT_ROUNDOFF["float32"] * (2 * self.largest_logit + math.log(self.vocab_size))
        return self._relative * self.largest_logit + stored

    def logprob(self, logprobs: np.ndarray) -> np.ndarray:
        """Largest difference of these log-probs. One that is far below the others has a larger logit."""
        normalizer = self.vocab_size / _PARTIAL_SUMS * _UNIT_ROUNDOFF["float32"]
        excess = np.maximum(np.abs(np.nan_to_num(logprobs, neginf=0.0)) - NEGLIGIBLE_NATS, 0.0)
        limits: np.ndarray = 2 * (self.logit + self._relative * excess) + normalizer
        return limits


class Agreement(NamedTuple):
    """The largest differences found, and the limits: of a log-prob in nats, and of the KL at a position."""

    logprob: float
    logprob_limit: float
    kl: float
    kl_limit: float


def self_check_sequences(header: DatasetHeader, *, seed: int, images: ImageRules | None = None) -> list[TokenSequence]:
    """Sequences of random tokens, and last one with an image if there are `images`; all positions are targets."""
    sequences = random_sequences(_LENGTHS, header, seed=seed, images=images)
    for prefix, whole in _PREFIXES:
        shared = min(sequences[prefix].token_ids.size, _SHARED_TOKENS)
        sequences[prefix].token_ids[:shared] = sequences[whole].token_ids[:shared]
    return [*sequences, image_probe(header, images, seed=seed)] if images else sequences


def check_agreement(
    tap: Score,
    public: Score,
    header: DatasetHeader,
    arithmetic: Callable[[], Arithmetic],
    images: ImageRules | None = None,
) -> Agreement:
    """How far the two paths differ on the sequences of `self_check_sequences`.

    `arithmetic` is called after the tap has scored. Raises `TeacherOutputInvalid` above the limits, and
    `TeacherUnusable` for weights that give NaN or infinite logits.
    """
    sets = (self_check_sequences(header, seed=seed, images=images) for seed in range(TRIES))
    scored = require_finite(public, sets, model=header.teacher.name)
    sequences, together = [one.sequence for one in scored], [one.targets for one in scored]
    own = _own_differences(together, [_finite(public([sequence]))[0] for sequence in sequences])
    ways = {
        "together": _finite(tap(sequences)),
        "in reverse order": _finite(tap(sequences[::-1]))[::-1],
        "alone": [_finite(tap([sequence]))[0] for sequence in sequences],
    }
    expected = arithmetic()
    kl_limit = (expected.logit / math.sqrt(2) + 2 * math.sqrt(max(own.kl, 0.0))) ** 2
    found = Agreement(0.0, 0.0, 0.0, kl_limit)
    for way, answers in ways.items():
        for sequence, ours, theirs in zip(sequences, answers, together, strict=True):
            kl = float(_kl(theirs, ours).max())
            difference, limit = _worst(ours, theirs, expected, own.logprob)
            if not (kl <= kl_limit and difference <= limit):
                raise TeacherOutputInvalid(
                    f"self-check of the tap, on a sequence of {sequence.token_ids.size} tokens scored {way}",
                    found=f"a KL of {kl:.2g} nats from vLLM's public path, log-probs that differ by {difference:.2g}",
                    wanted=f"a KL of at most {kl_limit:.2g}, log-probs within {limit:.2g}",
                    fix="set teacher.tap: public, and report the versions of vLLM and torch",
                )
            found = found._replace(kl=max(found.kl, kl))
            if difference >= found.logprob:
                found = found._replace(logprob=difference, logprob_limit=limit)
    return found


def _finite(results: Sequence[ScoreResult]) -> list[TeacherTargets]:
    for result in results:
        if isinstance(result, UnscoredSequence):
            raise TeacherOutputInvalid(
                f"self-check of the tap, sequence {result.sample_id}",
                found="NaN or infinite logits where an earlier run gave finite ones",
                wanted="the same results from each run",
                fix="set teacher.tap: public, and report the versions of vLLM and torch",
            )
    return [result.targets for result in scored_of(results)]


class _Own(NamedTuple):
    logprob: float
    kl: float


def _own_differences(together: Sequence[TeacherTargets], alone: Sequence[TeacherTargets]) -> _Own:
    """Between runs of the public path, whose results are `together` and `alone`."""
    pairs = list(zip(alone, together, strict=True))
    for prefix, whole in _PREFIXES:
        count = min(together[prefix].positions, together[whole].positions, _SHARED_TOKENS - 1)
        pairs.append((together[prefix].slice(0, count), together[whole].slice(0, count)))
    differences = (np.column_stack(_differences(one, other)).max() for one, other in pairs)
    return _Own(float(max(differences)), max(float(_kl(one, other).max()) for one, other in pairs))


def _worst(ours: TeacherTargets, theirs: TeacherTargets, expected: Arithmetic, own: float) -> tuple[float, float]:
    """The difference that is largest relative to its limit, and that limit."""
    differences = np.column_stack(_differences(ours, theirs))
    limits = expected.logprob(np.column_stack([theirs.label_logprob, _by_rank(theirs)])) + 2 * own
    with np.errstate(invalid="ignore"):
        worst = int(np.nan_to_num(differences / limits, nan=np.inf).argmax())
    return float(differences.flat[worst]), float(limits.flat[worst])


def _differences(one: TeacherTargets, other: TeacherTargets) -> tuple[np.ndarray, np.ndarray]:
    """Of the label's log-probs, `[N]`, and of the kept ones by rank, because ties may be swapped, `[N, K]`."""
    return _apart(one.label_logprob, other.label_logprob), _apart(_by_rank(one), _by_rank(other))


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Absolute differences; two equal infinities, of a masked id, do not differ."""
    with np.errstate(invalid="ignore"):
        apart: np.ndarray = np.where(one == other, 0.0, np.abs(one.astype(float) - other))
    return apart


def _by_rank(targets: TeacherTargets) -> np.ndarray:
    return -np.sort(-targets.logprobs, axis=1)


def _kl(some: TeacherTargets, others: TeacherTargets) -> np.ndarray:
    """`[N]`: KL(some || others) of the softmax over the ids that `some` keeps, nats.

    An id that `others` does not keep has at most the smallest of its kept log-probs there.
    """
    least = np.where(others.kept, others.logprobs, np.inf).min(1).astype(float)
    same = (some.ids[:, :, None] == others.ids[:, None, :]) & others.kept[:, None, :]
    looked_up = np.where(same, others.logprobs[:, None, :].astype(float), -np.inf).max(2)
    there = np.where(same.any(2), looked_up, least[:, None])
    ours = _normalized(some.logprobs.astype(float), some.kept)
    there = _normalized(there, some.kept)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.exp(ours) > 0, np.exp(ours) * (ours - there), 0.0)
    kl: np.ndarray = np.where(np.isnan(some.logprobs).any(1) | np.isnan(others.logprobs).any(1), np.nan, terms.sum(1))
    return kl


def largest_kl(some: Sequence[TeacherTargets], others: Sequence[TeacherTargets]) -> float:
    """The largest KL of a position, see `_kl`; NaN if one is."""
    return float(np.concatenate([_kl(one, other) for one, other in zip(some, others, strict=True)]).max())


def _normalized(logprobs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    logprobs = np.where(kept, logprobs, -np.inf)
    normalized: np.ndarray = logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    return normalized
