"""Coordinates of ranks by rank order, and how much of a cluster is drawn."""

from __future__ import annotations

import itertools
from dataclasses import replace

from launcher.planner.search.ranking import Ranking
from launcher.report.rank_map import coordinates, cut, rank_map, strides
from strategies.spec import Plan

PLAN = Plan(strategy="fake", dp=4, tp=2, pp=4)


def test_ranks_count_through_the_degrees_in_rank_order() -> None:
    assert coordinates(PLAN, 0) == {"tp": 0, "cp": 0, "dp": 0, "pp": 0}
    assert coordinates(PLAN, 13) == {"tp": 1, "cp": 0, "dp": 2, "pp": 1}
    outermost = replace(PLAN, rank_order=("tp", "pp", "cp", "dp"))
    assert coordinates(outermost, 13) == {"tp": 1, "pp": 2, "cp": 0, "dp": 1}
    assert strides(outermost) == {"tp": 1, "pp": 2, "cp": 8, "dp": 8}


def test_every_place_is_taken_once() -> None:
    places = [tuple(coordinates(PLAN, rank).values()) for rank in range(PLAN.world_size)]
    assert sorted(places) == sorted(itertools.product(range(2), range(1), range(4), range(4)))


def test_the_map_names_each_rank_with_its_place(mixture: Ranking) -> None:
    cluster = mixture.problem.cluster
    html = rank_map(PLAN, cluster)
    assert cut(cluster) == "All 32 ranks are drawn."
    assert "<title>rank 13: tp1 dp2 pp1</title>" in html
    assert html.count('class="cell"') == 32
    assert "pipeline stages" in html


def test_groups_say_what_they_span(mixture: Ranking) -> None:
    html = rank_map(PLAN, mixture.problem.cluster)
    rows = [row.split("</td>") for row in html.split("<tr>")[2:]]
    found = {cells[0].rpartition(">")[2]: [cell.rpartition(">")[2] for cell in cells[1:6]] for cells in rows}
    assert found["tp"] == ["2", "1", "0, 1", "one node", "450"]
    assert found["dp"] == ["4", "2", "0, 2, 4, 6", "one node", "450"]
    assert found["pp"] == ["4", "8", "0, 8, 16, 24", "several nodes", "50"]
    assert found["cp"] == ["1", "2", "0", "-", "-"]


def test_a_large_cluster_is_cut_and_says_so(mixture: Ranking) -> None:
    cluster = replace(mixture.problem.cluster, num_nodes=100)
    html = rank_map(replace(PLAN, dp=100), cluster)
    assert cut(cluster) == "Drawn are the first 16 of 100 nodes; the others go on in the same order."
    assert html.count('class="cell"') == 16 * 8
    wide = replace(cluster, num_nodes=1, gpus_per_node=64)
    assert "the first 16 ranks of each" in cut(wide)
