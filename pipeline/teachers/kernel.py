"""From logits to targets: top K, exact tail, label and tail draws of full softmaxes. Torch only, no engine.

Shape letters: `N` target positions, `V` vocabulary (logit columns), `W` columns of work memory (`token_count` rounded
up to whole blocks), `B` entries of a block, `K` teacher top-k, `D` draws, `R` kept draws of a position at the most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

_B = 64
"""Entries of a block. Block maxima find the top K, block sums find a draw, without a second look at the whole row.
Measured on one CPU thread, microseconds for a row of V = 151,936: `topk` alone 175 at K = 16 and 235 at K = 128, by
block maxima 28 and 110; 32 and 256 entries are slower at one end or the other."""
_WORK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""What is worked on at a time. On a CPU it stays in the cache between the passes."""


class Summary(NamedTuple):
    """Targets as tensors of fixed shapes, on the logits' device: nothing here waits for a GPU.

    `ids int32 [N, K]` by descending log-prob, `logprobs float32 [N, K]` (-inf where not kept), `counts int32 [N]`,
    `log_tail`, `label_logprob float32 [N]`, `draw_ids int32 [N, R]` and `draw_logprobs float32 [N, R]`, of which the
    first `draw_counts int32 [N]` of each position are draws, `beyond float32 [N]`: the softmax mass that logit columns
    from `token_count` on would have had, `finite bool [N]`: false where a logit was not a number or +inf.
    """

    ids: Tensor
    logprobs: Tensor
    counts: Tensor
    log_tail: Tensor
    label_logprob: Tensor
    draw_ids: Tensor
    draw_logprobs: Tensor
    draw_counts: Tensor
    beyond: Tensor
    finite: Tensor


class Kernel:
    """The summary of logits, for one set of settings. Keeps its work memory: fresh temporaries of this size cost more
    than the arithmetic (new pages each time). Not for several threads at once."""

    def __init__(self, *, top_k: int, min_prob: float, kept_draws: int, token_count: int):
        self.top_k, self.min_prob, self.kept_draws, self.token_count = top_k, min_prob, kept_draws, token_count
        self._width = -(-token_count // _B) * _B
        self._work = torch.empty(0, self._width)

    def __call__(self, logits: Tensor, labels: Tensor, uniforms: Tensor) -> Summary:
        """Summary of `logits [N, V]` (any float type) with `labels int64 [N]` and `uniforms float64 [N, D]`.

        Columns from `token_count` on (padding rows of the head) are removed before the softmax. Totals are taken in
        float64: a float32 log-softmax over 32,000 entries alone is off by 5e-6. The tail is the sum of the entries
        outside the kept ids, never 1 minus the rest. The kept ids are the top K after the floor, and tail, label and
        draws are relative to them. Draws: the kept ids' mass is laid first on the unit interval; a uniform below it is
        a draw inside and is dropped, the others are looked up on the cumulative sum of the tail alone, and the first
        `kept_draws` of them are kept: chosen by their place, they are iid draws from the tail still.
        """
        rows = max(1, _WORK_BYTES.get(logits.device.type, _WORK_BYTES["cuda"]) // (4 * self._width))
        parts = [
            self._block(logits[start : start + rows], labels[start : start + rows], uniforms[start : start + rows])
            for start in range(0, logits.shape[0], rows)
        ] or [self._block(logits, labels, uniforms)]
        return parts[0] if len(parts) == 1 else Summary(*map(torch.cat, zip(*parts, strict=True)))

    def _block(self, logits: Tensor, labels: Tensor, uniforms: Tensor) -> Summary:
        work = self._scores(logits)
        values, ids = self._top(work)
        best = values[:, :1]
        label = work.gather(1, labels[:, None])[:, 0].double() - best[:, 0].double()
        weights = work.sub_(best).exp_()
        kept_weights = weights.gather(1, ids)
        weights.scatter_(1, ids, 0.0)
        blocks = weights.view(-1, self._width // _B, _B).sum(-1)
        wide = kept_weights.double()
        total = blocks.sum(-1, dtype=torch.float64) + wide.sum(-1)
        kept = wide >= self.min_prob * total[:, None]
        kept[:, 0] = True

        kept_total = wide.masked_fill(~kept, 0.0).sum(-1)
        # Entries under the floor are part of the tail.
        tail_total = blocks.sum(-1, dtype=torch.float64) + wide.masked_fill(kept, 0.0).sum(-1)
        log_total = torch.log(total)
        if uniforms.shape[1]:
            under = kept_weights.masked_fill(kept, 0.0)
            weights.scatter_(1, ids, under)
            blocks.scatter_add_(1, ids // _B, under)
        draws = _tail_draws(weights, blocks, uniforms * total[:, None] - kept_total[:, None], self.kept_draws)
        logprobs = (values - best).double() - log_total[:, None]
        return Summary(
            ids=torch.where(kept, ids, ids[:, :1]).int(),
            logprobs=logprobs.masked_fill(~kept, -torch.inf).float(),
            counts=kept.sum(-1).int(),
            log_tail=(torch.log(tail_total) - log_total).clamp(min=LOG_FLOOR, max=0.0).float(),
            label_logprob=(label - log_total).clamp(max=0.0).float(),
            draw_ids=draws.ids.int(),
            draw_logprobs=(draws.weights.double().log() - log_total[:, None]).clamp(max=0.0).float(),
            draw_counts=draws.counts.int(),
            beyond=self._beyond(logits, best[:, 0], total),
            finite=torch.isfinite(total),
        )

    def _scores(self, logits: Tensor) -> Tensor:
        """`float32 [N, W]`: the logits in work memory, -inf beyond `token_count`."""
        if self._work.shape[0] < logits.shape[0] or self._work.device != logits.device:
            self._work = torch.empty(logits.shape[0], self._width, device=logits.device)
        work = self._work[: logits.shape[0]]
        work[:, : self.token_count].copy_(logits[:, : self.token_count])
        work[:, self.token_count :].fill_(-torch.inf)
        return work

    def _top(self, work: Tensor) -> tuple[Tensor, Tensor]:
        """The K largest entries and their columns. They lie in the K blocks with the largest maxima."""
        blocks = self._width // _B
        if blocks < 4 * self.top_k:
            return torch.topk(work, self.top_k)
        in_blocks = work.view(-1, blocks, _B)
        best = torch.topk(in_blocks.amax(-1), self.top_k, sorted=False).indices
        candidates = in_blocks.gather(1, best[:, :, None].expand(-1, -1, _B)).flatten(1)
        values, places = torch.topk(candidates, self.top_k)
        return values, best.gather(1, places // _B) * _B + places % _B

    def _beyond(self, logits: Tensor, best: Tensor, total: Tensor) -> Tensor:
        if logits.shape[1] <= self.token_count:
            return torch.zeros_like(best)
        mass = torch.exp(logits[:, self.token_count :].float() - best[:, None]).sum(-1)
        return mass / (mass + total.float())


class _Draws(NamedTuple):
    """`ids`, `weights [N, R]` and `counts [N]`."""

    ids: Tensor
    weights: Tensor
    counts: Tensor


def _tail_draws(weights: Tensor, blocks: Tensor, depths: Tensor, kept_draws: int) -> _Draws:
    """Draws from the tail `weights [N, W]` with block sums `blocks [N, W / B]`, at `depths float64 [N, D]` of its
    cumulative sum; negative ones are draws from the kept ids. Inverse CDF on two levels: the block, then inside it."""
    cumulative = blocks.cumsum(-1, dtype=torch.float64)
    hit = (depths >= 0) & (cumulative[:, -1:] > 0)
    place = hit.cumsum(-1) - 1
    hit &= place < kept_draws
    counts = hit.sum(-1)
    most = width = min(kept_draws, depths.shape[1])
    if depths.device.type == "cpu":  # elsewhere this would wait for the device
        width = int(counts.max()) if counts.numel() else 0
    if not width:
        nothing = depths.new_zeros(len(depths), most)
        return _Draws(nothing, nothing, counts)
    # Each draw to its place among the kept ones; all others to one place more, which is cut off.
    depth = depths.new_zeros(len(depths), width + 1)
    depth.scatter_(1, torch.where(hit, place, width), depths)
    depth = torch.minimum(depth[:, :width], _below(cumulative[:, -1:]))
    block = torch.searchsorted(cumulative, depth, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    entries = weights.view(-1, blocks.shape[1], _B).gather(1, block[:, :, None].expand(-1, -1, _B))
    inside = entries.cumsum(-1, dtype=torch.float64)
    # The block's sum was taken in float32: the rest must not step past the last entry that has any mass.
    rest = torch.minimum(depth - before, _below(inside[:, :, -1]))
    offset = (inside <= rest[:, :, None]).sum(-1).clamp(max=_B - 1)
    drawn = entries.gather(2, offset[:, :, None])[:, :, 0]
    unused = (0, most - width)
    return _Draws(functional.pad(block * _B + offset, unused), functional.pad(drawn, unused), counts)


def _below(sums: Tensor) -> Tensor:
    """The largest numbers below `sums`, which are not negative."""
    return torch.nextafter(sums, torch.zeros_like(sums))


def targets_of(summary: Summary, *, draw_logprobs: bool = False) -> TeacherTargets:
    """A summary's targets on the host."""
    draw_ids = summary.draw_ids.cpu().numpy()
    draw_counts = summary.draw_counts.cpu().numpy()
    drawn = np.arange(draw_ids.shape[1]) < draw_counts[:, None]
    return TeacherTargets(
        ids=summary.ids.cpu().numpy(),
        logprobs=summary.logprobs.cpu().numpy(),
        counts=summary.counts.cpu().numpy(),
        log_tail=summary.log_tail.cpu().numpy(),
        label_logprob=summary.label_logprob.cpu().numpy(),
        draw_ids=draw_ids[drawn],
        draw_counts=draw_counts,
        draw_logprobs=summary.draw_logprobs.cpu().numpy()[drawn] if draw_logprobs else None,
    )


def summarise(
    logits: Tensor,
    labels: Tensor,
    uniforms: np.ndarray,
    *,
    top_k: int,
    min_prob: float,
    kept_draws: int,
    token_count: int,
    draw_logprobs: bool = False,
) -> TeacherTargets:
    """Targets of `logits [N, V]` with `labels int64 [N]` and `uniforms float64 [N, D]`, as `Kernel` makes them."""
    kernel = Kernel(top_k=top_k, min_prob=min_prob, kept_draws=kept_draws, token_count=token_count)
    summary = kernel(logits, labels, torch.from_numpy(uniforms).to(logits.device))
    return targets_of(summary, draw_logprobs=draw_logprobs)
