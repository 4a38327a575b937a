"""Draws from the tail of many positions at once: at which depths of the cumulative sum, and which ids lie there.

Torch only. Nothing waits for a GPU. Shape letters: `N` target positions, `W` columns, in blocks of `B`, `D` draws, `R`
most kept draws of a position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Depths(NamedTuple):
    """`depths float64 [N, n]` of the cumulative sum of a tail, of which the first `counts int64 [N]` are draws. `most`
    is R; n may be smaller."""

    depths: Tensor
    counts: Tensor
    most: int


class Draws(NamedTuple):
    """`ids`, `weights [N, R]` and `counts [N]`."""

    ids: Tensor
    weights: Tensor
    counts: Tensor


def iid_depths(depths: Tensor, *, most: int) -> Depths:
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
    return Depths(chosen[:, :width], counts, most)


def systematic_depths(uniforms: Tensor, tails: Tensor, shares: Tensor, *, draws: int, most: int) -> Depths:
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
    return Depths(depths, counts, most)


def look_up(weights: Tensor, blocks: Tensor, chosen: Depths) -> Draws:
    """The ids at depths of the cumulative sum of the tails `weights [N, W]`, whose block sums are `blocks [N, W / B]`.

    Inverse CDF on two levels: the block, then inside it. A tail without mass has no draws.
    """
    cumulative = blocks.cumsum(-1, dtype=torch.float64)
    counts = chosen.counts.where(cumulative[:, -1] > 0, 0)
    width = chosen.depths.shape[1]
    if not width:
        nothing = chosen.depths.new_zeros(len(blocks), chosen.most)
        return Draws(nothing, nothing, counts)
    size = weights.shape[1] // blocks.shape[1]
    depth = torch.minimum(chosen.depths, _below(cumulative[:, -1:]))
    block = torch.searchsorted(cumulative, depth, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    entries = weights.view(-1, blocks.shape[1], size).gather(1, block[:, :, None].expand(-1, -1, size))
    inside = entries.cumsum(-1, dtype=torch.float64)
    # The block's sum is float32: the rest must not step past the last entry that has any mass.
    rest = torch.minimum(depth - before, _below(inside[:, :, -1]))
    offset = (inside <= rest[:, :, None]).sum(-1).clamp(max=size - 1)
    drawn = entries.gather(2, offset[:, :, None])[:, :, 0]
    unused = (0, chosen.most - width)
    return Draws(functional.pad(block * size + offset, unused), functional.pad(drawn, unused), counts)


def _width(counts: Tensor, most: int) -> int:
    """Columns for `counts [N]` draws, at most `most`."""
    if counts.device.type != "cpu":  # the largest count would be waited for
        return most
    return int(counts.max()) if counts.numel() else 0


def _below(sums: Tensor) -> Tensor:
    """The largest numbers below `sums`, which are not negative."""
    return torch.nextafter(sums, torch.zeros_like(sums))
