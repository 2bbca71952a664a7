"""Bytes of every stage: one for each, the fullest among them that of the ranking."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.planner.calibration import Calibration
from launcher.planner.price.stage_costs import all_stages, memory_by_stage
from launcher.planner.price.stages import stages_of
from launcher.planner.problem import PlanRequest, Problem
from launcher.planner.search.ranking import Ranking, rank
from strategies.spec import Plan


def test_every_stage_is_there_with_its_layers(dense: Ranking) -> None:
    model = dense.problem.model
    plan = Plan(strategy="fake", dp=1, pp=8, num_microbatches=16, pipeline_split=(3, 4, 4, 4, 4, 4, 4, 5))
    stages = all_stages(model, plan)
    assert [stage.index for stage in stages] == list(range(8))
    assert [stage.num_layers for stage in stages] == list(plan.pipeline_split)
    assert [stage.has_embedding for stage in stages] == [True] + 7 * [False]
    assert [stage.has_head for stage in stages] == 7 * [False] + [True]
    assert {stage.index for stage in stages_of(model, plan)} <= set(range(8))


def test_the_fullest_stage_is_that_of_the_prediction(dense: Ranking) -> None:
    problem = dense.problem
    small = replace(problem.model, num_layers=4, hidden_size=256, ffn_hidden_size=512, vocab_size=1000)
    ranking = rank(small, problem.cluster, problem.training, PlanRequest(), strategies=["deepspeed"])
    best = ranking.choose()
    assert best.cost is not None
    found = memory_by_stage(Problem(**{**vars(problem), "model": small}), best.plan)
    assert found[best.cost.stage][1].total == pytest.approx(best.cost.memory.total)


def test_bytes_follow_a_calibration(dense: Ranking) -> None:
    run = Calibration(time=1.0, memory=1.25, run="runs/a", date="2026-01-01T00:00:00Z", host="here")
    measured = replace(dense.problem, calibration=run)
    plan = dense.candidates[0].plan
    ((_, before),), ((_, after),) = memory_by_stage(dense.problem, plan), memory_by_stage(measured, plan)
    assert after.total == pytest.approx(1.25 * before.total)


def test_later_stages_keep_fewer_micro_batches(dense: Ranking) -> None:
    plan = Plan(strategy="fake", dp=1, pp=8, num_microbatches=16)
    kept = [cost.activations for _, cost in memory_by_stage(dense.problem, plan)][1:-1]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
