"""Histograms of a step as sinks draw them: the bins that hold something, between finite borders."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.bins import BORDERS

# What lies beyond the last border is drawn as if it ended one decade further on.
_EDGES = (10 * BORDERS[0], *BORDERS, 10 * BORDERS[-1])


def drawn(counts: Mapping[str, int]) -> tuple[list[float], list[int]]:
    """Return borders and counts, one border more than counts, from counts by bin."""
    filled = sorted(int(place) for place, count in counts.items() if count)
    if not filled:
        return [-BORDERS[-1], BORDERS[-1]], [0]
    places = range(filled[0], filled[-1] + 1)
    return list(_EDGES[places[0] : places[-1] + 2]), [counts.get(str(place), 0) for place in places]
