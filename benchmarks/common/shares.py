"""Shares of a gain: where a side lies between one without a teacher and one with the whole teacher."""

from __future__ import annotations

from collections.abc import Mapping


def shares_of_gain(kls: Mapping[str, Mapping[int, float]], *, floor: str, dense: str) -> dict[str, list[float]]:
    """Side -> its share of the gain in KL of side `dense` over side `floor`, for each seed that all three have.

    `kls`: by side and seed.
    """
    low, high = kls.get(dense, {}), kls.get(floor, {})
    return {
        side: [
            (high[seed] - kl) / (high[seed] - low[seed]) for seed, kl in of_seed.items() if seed in low and seed in high
        ]
        for side, of_seed in kls.items()
    }
