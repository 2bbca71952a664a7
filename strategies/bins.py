"""Bins of histograms: fixed ones, so that the counts of ranks add up. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

# Four borders a decade from 1e-12 to 1e4, on both sides of nothing.
_SIDE = tuple(10 ** (power / 4) for power in range(-48, 17))
BORDERS = (*(-border for border in reversed(_SIDE)), *_SIDE)

# By tensor ("gradients/<name>"), then by bin: how many elements. Bin i lies below BORDERS[i], the last above them all.
Histograms = dict[str, dict[int, int]]


def added(found: Sequence[Mapping[str, Mapping[int, int]]]) -> Histograms:
    """Add up the histograms of several ranks."""
    sums: dict[str, Counter[int]] = {}
    for own in found:
        for key, counts in own.items():
            sums.setdefault(key, Counter()).update(counts)
    return {key: dict(sorted(counts.items())) for key, counts in sorted(sums.items())}
