"""Turns logits into targets: top K, exact tail, label log-prob and tail draws. Torch only, no engine.

The uniforms of the tail draws are a function of (dataset seed, sample id, position, draw) and do not depend on
batching. Shape letters: `N` target positions, `V` vocabulary (logit columns), `W` columns of work memory (`token_count`
rounded up to whole blocks), `B` entries of a block, `K` teacher top-k, `D` draws, `U` uniforms of a position, `R` most
kept draws of a position, `M` ids that the source names at a position, `L` columns of the kept ids: K, and room for
those that are named.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from coldstill.common.rng import WORDS_PER_COUNT, to_uniforms
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

_B = 64
"""Entries of a block. Block maxima find the top K and block sums find a draw, without a second pass over the row.
Measured on one CPU thread, microseconds for a row of V = 151,936: `topk` alone 175 at K = 16 and 235 at K = 128, by
block maxima 28 and 110. Blocks of 32 and of 256 entries are slower at one end or the other."""
_WORK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Work memory by device type. On a CPU it stays in the cache between the passes."""


class Summary(NamedTuple):
    """Targets as tensors of fixed shapes on the logits' device: making them never waits for a GPU.

    `ids int32 [N, L]` by descending log-prob, `logprobs float32 [N, L]` (-inf where not kept), `counts int32 [N]`,
    `log_tail`, `label_logprob float32 [N]`. `draw_ids int32 [N, R]` and `draw_logprobs float32 [N, R]`, of which the
    first `draw_counts int32 [N]` of each position are draws. `padding_mass float32 [N]`: the softmax mass that the
    padding columns (from `token_count` on) would have had. `finite bool [N]`: false if a logit was NaN or +inf.
    """

    ids: Tensor
    logprobs: Tensor
    counts: Tensor
    log_tail: Tensor
    label_logprob: Tensor
    draw_ids: Tensor
    draw_logprobs: Tensor
    draw_counts: Tensor
    padding_mass: Tensor
    finite: Tensor


class TargetExtractor:
    """Makes summaries of logits, for one set of settings. Not thread-safe.

    It keeps its work memory, because fresh temporaries of this size (new pages each time) cost more than the
    arithmetic.
    """

    def __init__(
        self,
        *,
        top_k: int,
        min_prob: float,
        kept_draws: int,
        token_count: int,
        named_width: int = 0,
        systematic_draws: int = 0,
    ):
        """`named_width`: L - K, 0 without named ids. `systematic_draws`: D, if the draws are systematic; 0 if they are
        independent."""
        self.top_k, self.min_prob, self.kept_draws, self.token_count = top_k, min_prob, kept_draws, token_count
        self.named_width, self.systematic_draws = named_width, systematic_draws
        self._width = -(-token_count // _B) * _B
        self._work = torch.empty(0, self._width)

    def __call__(self, logits: Tensor, labels: Tensor, uniforms: Tensor, named: Tensor | None = None) -> Summary:
        """Summary of `logits [N, V]` (any float type) with `labels int64 [N]` and `uniforms float64 [N, U]`.

        `named int64 [N, M]`: distinct ids of each position that are kept beside the top K, -1 where fewer.

        - Padding columns are removed before the softmax.
        - Totals are float64: a float32 log-softmax over 32,000 entries alone is off by 5e-6.
        - The kept ids are those of the top K that reach the floor and are not -inf, and all that are named. Tail, label
          and draws are relative to them.
        - The tail is the sum of the entries outside the kept ids, never 1 minus the rest.
        - Independent draws (U = D): the mass of the kept ids comes first on the unit interval. A uniform inside it is a
          draw of a kept id and is dropped. The others are looked up on the cumulative sum of the tail alone, and the
          first `kept_draws` of them are kept. They are chosen by their place, so they are still iid draws from the
          tail.
        - Systematic draws (U = 2): D times the tail's mass, rounded up or down by the second uniform, at most
          `kept_draws`; at equal distances on the cumulative sum of the tail, with the first uniform as their shift.
        """
        rows = max(1, _WORK_BYTES.get(logits.device.type, _WORK_BYTES["cuda"]) // (4 * self._width))
        blocks = (slice(start, start + rows) for start in range(0, logits.shape[0], rows))
        parts = [
            self._block(logits[part], labels[part], uniforms[part], None if named is None else named[part])
            for part in blocks
        ] or [self._block(logits, labels, uniforms, named)]
        return parts[0] if len(parts) == 1 else Summary(*map(torch.cat, zip(*parts, strict=True)))

    def _block(self, logits: Tensor, labels: Tensor, uniforms: Tensor, named: Tensor | None) -> Summary:
        work = self._scores(logits)
        values, ids = self._top(work)
        best = values[:, :1]
        label = work.gather(1, labels[:, None])[:, 0].double() - best[:, 0].double()
        # Also where K is the whole vocabulary: a named id below the floor is kept.
        marks = None if named is None else _NamedMarks.of(ids, named, width=self._width)
        if marks:
            ids = torch.cat((ids, marks.columns), 1)
            values = torch.cat((values, work.gather(1, marks.columns)), 1)
        weights = work.sub_(best).exp_()
        kept_weights = weights.gather(1, ids)
        if marks:
            kept_weights[:, self.top_k :].masked_fill_(~marks.is_new, 0.0)
        weights.scatter_(1, ids, 0.0)
        blocks = weights.view(-1, self._width // _B, _B).sum(-1)
        wide = kept_weights.double()
        total = blocks.sum(-1, dtype=torch.float64) + wide.sum(-1)
        # Padding columns are -inf in `work`: a position with fewer than K tokens of any mass would keep some of them.
        kept = (wide >= self.min_prob * total[:, None]) & (values > -torch.inf)
        kept[:, 0] = True
        if marks:
            kept = torch.cat((kept[:, : self.top_k] | marks.top_is_named, marks.is_new), 1)

        kept_total = wide.masked_fill(~kept, 0.0).sum(-1)
        # Entries under the floor are part of the tail.
        tail_total = blocks.sum(-1, dtype=torch.float64) + wide.masked_fill(kept, 0.0).sum(-1)
        log_total = torch.log(total)
        if uniforms.shape[1]:
            under = kept_weights.masked_fill(kept, 0.0)
            weights.scatter_(1, ids, under)
            blocks.scatter_add_(1, ids // _B, under)
        if self.systematic_draws:
            chosen = _systematic_depths(
                uniforms, tail_total, tail_total / total, draws=self.systematic_draws, most=self.kept_draws
            )
        else:
            chosen = _iid_depths(uniforms * total[:, None] - kept_total[:, None], most=self.kept_draws)
        draws = _look_up(weights, blocks, chosen)
        ids = torch.where(kept, ids, ids[:, :1])
        logprobs = ((values - best).double() - log_total[:, None]).masked_fill(~kept, -torch.inf)
        if marks or self.named_width:
            ids, logprobs = self._with_named(ids, logprobs, kept)
        return Summary(
            ids=ids.int(),
            logprobs=logprobs.float(),
            counts=kept.sum(-1).int(),
            log_tail=(torch.log(tail_total) - log_total).clamp(min=LOG_FLOOR, max=0.0).float(),
            label_logprob=(label - log_total).clamp(max=0.0).float(),
            draw_ids=draws.ids.int(),
            draw_logprobs=(draws.weights.double().log() - log_total[:, None]).clamp(max=0.0).float(),
            draw_counts=draws.counts.int(),
            padding_mass=self._padding_mass(logits, best[:, 0], total),
            finite=torch.isfinite(total),
        )

    def _with_named(self, ids: Tensor, logprobs: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, L]` by descending log-prob. A named id that has no mass at all is kept with the least log-prob."""
        logprobs = torch.where(kept, logprobs.clamp(min=LOG_FLOOR), -torch.inf)
        wide = self.top_k + self.named_width
        logprobs, order = functional.pad(logprobs, (0, max(0, wide - ids.shape[1])), value=-torch.inf).sort(
            dim=1, descending=True, stable=True
        )
        padded = torch.cat((ids, ids[:, :1].expand(-1, max(0, wide - ids.shape[1]))), 1)
        # All ids are distinct, so no more than `wide`, or all tokens, are kept.
        return padded.gather(1, order)[:, :wide], logprobs[:, :wide]

    def _scores(self, logits: Tensor) -> Tensor:
        """`float32 [N, W]`: the logits in work memory, -inf from `token_count` on."""
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

    def _padding_mass(self, logits: Tensor, best: Tensor, total: Tensor) -> Tensor:
        if logits.shape[1] <= self.token_count:
            return torch.zeros_like(best)
        # As logarithms: a padding logit may be so far above all tokens that its exponential is infinite.
        log_mass = torch.logsumexp(logits[:, self.token_count :].float() - best[:, None], -1)
        return torch.sigmoid(log_mass - torch.log(total).float())


class _NamedMarks(NamedTuple):
    """Named ids against the top K: `columns int64 [N, M]`, an id of the top K where an entry adds nothing; `is_new
    bool [N, M]`; `top_is_named bool [N, K]`."""

    columns: Tensor
    is_new: Tensor
    top_is_named: Tensor

    @classmethod
    def of(cls, top: Tensor, named: Tensor, *, width: int) -> _NamedMarks:
        """Marks of `named int64 [N, M]`, -1 for none, beside `top int64 [N, K]`, all below `width`."""
        is_named = named >= 0
        # By a table of all tokens: a comparison of all pairs would take K x M bytes for each position.
        table = torch.zeros(len(top), width + 1, dtype=torch.bool, device=top.device)
        is_new = is_named & ~table.scatter(1, top, True).gather(1, named.clamp(min=0))
        top_is_named = table.scatter(1, torch.where(is_named, named, width), True).gather(1, top)
        return cls(torch.where(is_new, named, top[:, :1]), is_new, top_is_named)


class _Depths(NamedTuple):
    """`depths float64 [N, n]` of the cumulative sum of a tail, of which the first `counts int64 [N]` are draws. `most`
    is R; n may be smaller."""

    depths: Tensor
    counts: Tensor
    most: int


class _Draws(NamedTuple):
    """`ids`, `weights [N, R]` and `counts [N]`."""

    ids: Tensor
    weights: Tensor
    counts: Tensor


def _iid_depths(depths: Tensor, *, most: int) -> _Depths:
    """The first `most` of `depths float64 [N, D]` that are in the tail. Negative depths are draws of kept ids."""
    hit = depths >= 0
    place = hit.cumsum(-1) - 1
    hit &= place < most
    counts = hit.sum(-1)
    most = min(most, depths.shape[1])
    width = _width(counts, most)
    # Each draw to its place among the kept ones; all others to the column after them, which is cut off.
    chosen = depths.new_zeros(len(depths), width + 1)
    chosen.scatter_(1, torch.where(hit, place, width), depths)
    return _Depths(chosen[:, :width], counts, most)


def _systematic_depths(uniforms: Tensor, tails: Tensor, shares: Tensor, *, draws: int, most: int) -> _Depths:
    """Equally spaced depths of `tails float64 [N]`: `draws` times `shares float64 [N]`, at most `most`.

    `uniforms float64 [N, 2]`: the shift of the depths, as a part of their distance, and what rounds their number up or
    down, so that its mean is exact. Given the number, each depth is uniform in its own part of the tail, and all parts
    have the same mass: the draws together are an unbiased sample of the tail. A smaller number is a coarser spacing: a
    part of a systematic sample in order of ids would not be a sample of the whole tail.
    """
    counts = torch.floor(draws * shares + uniforms[:, 1]).nan_to_num(0).clamp(0, most).long()
    most = min(most, draws)
    places = torch.arange(_width(counts, most), device=uniforms.device)
    depths = (places + uniforms[:, :1]) * (tails / counts.clamp(min=1))[:, None]
    return _Depths(depths, counts, most)


def _look_up(weights: Tensor, blocks: Tensor, chosen: _Depths) -> _Draws:
    """The ids at depths of the cumulative sum of the tails `weights [N, W]`, whose block sums are `blocks [N, W / B]`.

    Inverse CDF on two levels: the block, then inside it. A tail without mass has no draws.
    """
    cumulative = blocks.cumsum(-1, dtype=torch.float64)
    counts = chosen.counts.where(cumulative[:, -1] > 0, 0)
    width = chosen.depths.shape[1]
    if not width:
        nothing = chosen.depths.new_zeros(len(blocks), chosen.most)
        return _Draws(nothing, nothing, counts)
    depth = torch.minimum(chosen.depths, _below(cumulative[:, -1:]))
    block = torch.searchsorted(cumulative, depth, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    entries = weights.view(-1, blocks.shape[1], _B).gather(1, block[:, :, None].expand(-1, -1, _B))
    inside = entries.cumsum(-1, dtype=torch.float64)
    # The block's sum is float32: the rest must not step past the last entry that has any mass.
    rest = torch.minimum(depth - before, _below(inside[:, :, -1]))
    offset = (inside <= rest[:, :, None]).sum(-1).clamp(max=_B - 1)
    drawn = entries.gather(2, offset[:, :, None])[:, :, 0]
    unused = (0, chosen.most - width)
    return _Draws(functional.pad(block * _B + offset, unused), functional.pad(drawn, unused), counts)


def _width(counts: Tensor, most: int) -> int:
    """Columns for `counts [N]` draws, at most `most`."""
    if counts.device.type != "cpu":  # the largest count would be waited for
        return most
    return int(counts.max()) if counts.numel() else 0


def _below(sums: Tensor) -> Tensor:
    """The largest numbers below `sums`, which are not negative."""
    return torch.nextafter(sums, torch.zeros_like(sums))


def draw_uniforms(positions: np.ndarray, *, draws: int, seed: int, sample_id: str) -> np.ndarray:
    """`float64 [N, D]` in [0, 1) for the tail draws of one sample at ascending target `positions int64 [N]`.

    `draws`: their number, `uniform_count`. Philox4x64-10 (Salmon et al., SC 2011; numpy's), key = (seed, first 8 bytes
    of sha256 of the sample id), counter = position times the counter values that D uniforms take.
    """
    if not positions.size:
        return np.empty((0, draws))
    sample_key = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")
    counts = -(-draws // WORDS_PER_COUNT)
    first, last = int(positions[0]), int(positions[-1])
    generator = np.random.Philox(key=np.array([seed, sample_key], np.uint64)).advance(first * counts)
    words = generator.random_raw((last - first + 1, counts * WORDS_PER_COUNT))
    return to_uniforms(words[positions - first, :draws])


def systematic_draws(draws: int, *, draw_method: str) -> int:
    """D, where the draws are systematic; 0 where they are independent."""
    return draws if draw_method == "systematic" else 0


def uniform_count(draws: int, *, draw_method: str) -> int:
    """U: how many uniforms a position with D draws takes. Two place all systematic draws."""
    return 2 if systematic_draws(draws, draw_method=draw_method) else draws


def targets_of(summary: Summary, *, draw_logprobs: bool = False) -> TeacherTargets:
    """The targets of a summary, on the host; `draw_logprobs`: with the log-prob of each draw."""
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


def summarize(
    logits: Tensor,
    labels: Tensor,
    uniforms: np.ndarray,
    *,
    top_k: int,
    min_prob: float,
    kept_draws: int,
    token_count: int,
    draw_logprobs: bool = False,
    named: np.ndarray | None = None,
    named_width: int = 0,
    systematic_draws: int = 0,
) -> TeacherTargets:
    """Targets of `logits [N, V]` with `labels int64 [N]` and `uniforms float64 [N, U]`; see `TargetExtractor`."""
    extract = TargetExtractor(
        top_k=top_k,
        min_prob=min_prob,
        kept_draws=kept_draws,
        token_count=token_count,
        named_width=named_width,
        systematic_draws=systematic_draws,
    )
    on_device = torch.from_numpy(uniforms).to(logits.device)
    summary = extract(logits, labels, on_device, named_on(logits.device, named))
    return targets_of(summary, draw_logprobs=draw_logprobs)


def split_width(header: DatasetHeader) -> tuple[int, int]:
    """K, and L - K: the columns for ids that the source names. Together they are the header's `top_k`."""
    facts = header.about.score_ids
    if header.kept_ids == "top_k" or facts is None:
        return header.top_k, 0
    return facts.top_k, header.top_k - facts.top_k


def named_on(device: torch.device, named: np.ndarray | None) -> Tensor | None:
    """`named int [N, M]` as the extractor takes it."""
    return None if named is None else torch.from_numpy(named.astype(np.int64)).to(device, non_blocking=True)
