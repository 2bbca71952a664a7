"""What is drawn of a histogram's bins."""

from __future__ import annotations

from launcher.monitor.sinks.histograms import drawn
from strategies.bins import BORDERS


def test_only_the_filled_range_is_drawn() -> None:
    borders, counts = drawn({"70": 3, "72": 1})
    assert counts == [3, 0, 1]
    assert borders == list(BORDERS[69:73])


def test_what_lies_beyond_the_borders_has_an_end() -> None:
    borders, counts = drawn({"0": 1, str(len(BORDERS)): 2})
    assert (counts[0], counts[-1]) == (1, 2)
    assert (borders[0], borders[-1]) == (-1e5, 1e5)
    assert len(borders) == len(counts) + 1 == len(BORDERS) + 2


def test_nothing_is_an_empty_histogram() -> None:
    assert drawn({})[1] == [0]
