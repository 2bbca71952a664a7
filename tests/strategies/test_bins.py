"""Borders of the bins, and ranks that add up."""

from __future__ import annotations

from strategies.bins import BORDERS, added


def test_borders_grow_and_mirror() -> None:
    assert list(BORDERS) == sorted(set(BORDERS))
    assert [-border for border in reversed(BORDERS)] == list(BORDERS)
    assert (BORDERS[-1], min(map(abs, BORDERS))) == (1e4, 1e-12)


def test_ranks_add_up() -> None:
    found = added([{"a": {1: 2, 5: 1}}, {"a": {0: 1, 5: 3}, "b": {7: 1}}, {}])
    assert found == {"a": {0: 1, 1: 2, 5: 4}, "b": {7: 1}}
