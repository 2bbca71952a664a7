"""Sensitivity: what is varied, and what is said about it, with a made-up second ranking."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from launcher.errors import PlanError
from launcher.planner.search.ranking import Problem, Ranking
from launcher.planner.words import sensitivity as sensitivity_of
from launcher.planner.words.sensitivity import Shift, sensitivity, to_json, to_text, verdict


@pytest.fixture
def shifts(dense: Ranking, monkeypatch: pytest.MonkeyPatch) -> tuple[Shift, ...]:
    """Half the memory: nothing fits; a slow link: another plan; all else: the same."""

    def solve(problem: Problem) -> Ranking:
        if problem.cluster.gpu.memory_gib < 80:
            raise PlanError("nothing")
        if problem.cluster.links[0].gb_per_s < 450:
            return replace(dense, problem=problem, candidates=dense.candidates[1:])
        return replace(dense, problem=problem)

    monkeypatch.setattr(sensitivity_of, "solve", solve)
    return sensitivity(dense)


def test_every_link_in_use_and_the_memory_are_varied(dense: Ranking, shifts: tuple[Shift, ...]) -> None:
    assert [(shift.key, shift.factor) for shift in shifts] == [
        ("cluster.links[0].gb_per_s", 0.5),
        ("cluster.links[0].gb_per_s", 2.0),
        ("cluster.links[0].latency_us", 4.0),
        ("cluster.gpu.memory_gib", 0.5),
        ("cluster.gpu.memory_gib", 1.5),
        ("cluster.gpu.memory_gib", 2.0),
    ]
    wide = replace(dense, problem=replace(dense.problem, cluster=replace(dense.problem.cluster, num_nodes=2)))
    assert {shift.key for shift in sensitivity(wide)} >= {"cluster.links[1].gb_per_s"}


def test_one_sentence_names_what_the_choice_depends_on(dense: Ranking, shifts: tuple[Shift, ...]) -> None:
    assert verdict(dense, shifts) == (
        "the choice depends on cluster.links[0].gb_per_s, cluster.gpu.memory_gib; "
        "it holds whatever happens to cluster.links[0].latency_us"
    )
    assert verdict(dense, shifts[1:3]).startswith("the chosen plan stays the best one")


def test_the_text_says_the_plan_there_and_its_time(dense: Ranking, shifts: tuple[Shift, ...]) -> None:
    lines = to_text(dense, shifts).splitlines()
    assert len(lines) == 2 + len(shifts)
    assert lines[2].split() == [
        "cluster.links[0].gb_per_s",
        "450",
        "225",
        "3.460",
        "+1.2%",
        "plan.zero_stage=2",
    ]
    assert lines[3].endswith("the same")
    assert lines[5].endswith("none fits")


def test_the_same_as_data(dense: Ranking, shifts: tuple[Shift, ...]) -> None:
    data = json.loads(json.dumps(to_json(dense, shifts)))
    assert data["verdict"] == verdict(dense, shifts)
    first, second, _, none = data["shifts"][:4]
    assert first["changes"] == {"plan.zero_stage": {"chosen": 3, "then": 2}}
    assert (first["fits"], first["same_plan"], first["plan"]["zero_stage"]) == (True, False, 2)
    assert (second["same_plan"], second["step_s"]) == (True, pytest.approx(3.42))
    assert (none["fits"], none["plan"], none["step_s"]) == (False, None, None)
