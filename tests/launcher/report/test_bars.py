"""Stacked bars: heights that add up, the limit, and the same figures in a table."""

from __future__ import annotations

import re

import pytest

from launcher.planner.cost import GIB, parts
from launcher.planner.search.ranking import Ranking
from launcher.planner.words.explain import cost_of
from launcher.report.bars import memory_bars, memory_table, time_bars, time_table


def test_memory_bars_stand_on_the_axis_and_add_up(dense: Ranking) -> None:
    stages = [(index, cost_of(candidate).memory) for index, candidate in enumerate(dense.candidates)]
    html = memory_bars(stages, usable_bytes=76 * GIB, gpu_bytes=80 * GIB)
    blocks = re.findall(r'height="([\d.]+)" class="block hue\d"><title>stage (\d), (\w+): ([\d.]+) GiB', html)
    assert len(blocks) == 3 * 5
    for index, cost in stages:
        height = sum(float(found[0]) for found in blocks if found[1] == str(index))
        assert height == pytest.approx(cost.total / (80 * GIB) * 260, abs=0.05)
    assert "usable 76.00" in html
    assert "Stage 1 is the fullest: 61.27 of 76.00 usable GiB." in html


def test_a_stage_above_the_limit_is_drawn_whole(dense: Ranking) -> None:
    html = memory_bars([(0, cost_of(dense.candidates[1]).memory)], usable_bytes=30 * GIB, gpu_bytes=32 * GIB)
    assert all(float(y) >= 0 for y in re.findall(r' y="(-?[\d.]+)"', html))


def test_time_bars_show_the_parts_that_somebody_has(dense: Ranking) -> None:
    steps = [(str(index), parts(cost_of(c).time)) for index, c in enumerate(dense.candidates)]
    html = time_bars(steps)
    assert "Of the 0 plan, compute takes most: 96 % of the step." in html
    names = re.findall(r'aria-hidden="true"></span>(\w+)</li>', html)
    assert names == ["compute", "recompute", "dp", "optimizer"]
    assert "<title>2, recompute: 1.020 s</title>" in html


def test_tables_hold_the_same_figures(dense: Ranking) -> None:
    steps = [("chosen", parts(cost_of(dense.candidates[2]).time))]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", time_table(steps)) == [
        *("compute", "3.100", "recompute", "1.020", "dp", "0.0500", "optimizer", "0.0150", "total", "4.185"),
    ]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", memory_table([(0, cost_of(dense.candidates[0]).memory)]))
    assert cells == ["0", "1.87", "3.74", "11.22", "24.50", "6.85", "48.18"]
