"""The scatter: one point a plan, the chosen one ringed, engines apart by shape as well as by colour."""

from __future__ import annotations

import re

from launcher.planner.cost import GIB
from launcher.planner.search.ranking import Ranking
from launcher.report.scatter import MOST_POINTS, scatter


def test_every_candidate_is_a_point_and_the_chosen_one_has_a_ring(dense: Ranking) -> None:
    html = scatter(dense.candidates, usable_bytes=76 * GIB)
    assert len(re.findall(r'class="block hue\d"', html)) == 3
    assert html.count('class="ring"') == 1
    assert "<title>1: fake dp=8 zero_stage=3" in html
    assert re.findall(r"</span>(\w+)</li>", html) == ["deepspeed", "fake"]
    assert html.count("<circle") == 1 + 1  # deepspeed's point and the ring
    assert "All 3 plans." in html


def test_points_lie_inside_the_axes(dense: Ranking) -> None:
    html = scatter(dense.candidates, usable_bytes=76 * GIB)
    for x, y in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', html):
        assert 76 <= float(x) <= 796
        assert 24 <= float(y) <= 364


def test_too_many_points_are_cut_and_it_is_said(dense: Ranking) -> None:
    many = dense.candidates * 300
    html = scatter(many, usable_bytes=76 * GIB)
    assert len(re.findall(r'class="block hue\d"', html)) == MOST_POINTS
    assert f"The best {MOST_POINTS} of 900 plans." in html
