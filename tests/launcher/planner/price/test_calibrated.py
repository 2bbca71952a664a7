"""A calibrated search is the same search in other units: order kept, memory against the same limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.cluster.spec import ClusterSpec
from launcher.compose import jobs
from launcher.errors import PlanError
from launcher.planner.calibration import Calibration
from launcher.planner.cost import Candidate
from launcher.planner.problem import PlanRequest, Problem
from launcher.planner.search.ranking import Ranking, predict, solve
from strategies import capabilities


def calibration(*, time: float = 1.0, memory: float = 1.0) -> Calibration:
    return Calibration(time=time, memory=memory, run="a", date="b", host="c")


@pytest.fixture(scope="module")
def problem() -> Problem:
    [job] = jobs(["model=llama3_8b", "cluster=h100_sxm", "training.global_batch_size=64"])
    return Problem(
        model=job.model,
        cluster=job.cluster,
        training=job.training,
        request=PlanRequest(),
        strategies=("deepspeed",),
    )


def of(ranking: Ranking) -> dict[str, Candidate]:
    return {str(candidate.plan): candidate for candidate in ranking.candidates}


def test_seconds_and_bytes_are_scaled_apart(problem: Problem) -> None:
    plain = solve(problem).choose()
    assert plain.cost is not None
    engine = capabilities("deepspeed")
    found = predict(replace(problem, calibration=calibration(time=2.0, memory=1.5)), plain.plan, engine)
    assert found.step_s == pytest.approx(2 * plain.cost.step_s)
    assert found.memory.total == pytest.approx(1.5 * plain.cost.memory.total)
    assert found.mfu == pytest.approx(plain.cost.mfu / 2 if plain.cost.mfu else None)


@pytest.mark.parametrize("time", [0.3, 4.0])
def test_slower_by_a_constant_is_the_same_choice(problem: Problem, time: float) -> None:
    plain, slower = solve(problem), solve(replace(problem, calibration=calibration(time=time)))
    assert slower.choose().plan == plain.choose().plan
    assert of(plain).keys() == of(slower).keys()
    for key in of(plain):
        before, after = of(plain)[key].cost, of(slower)[key].cost
        assert before is not None and after is not None
        assert after.step_s == pytest.approx(time * before.step_s)


def test_more_memory_than_predicted_rules_plans_out(problem: Problem) -> None:
    plain = solve(problem)
    heavier = solve(replace(problem, calibration=calibration(memory=2.0)))
    usable = (problem.cluster.gpu.memory_gib - problem.cluster.reserved_gib) * 2**30
    assert all(c.cost is not None and c.cost.memory.total <= usable for c in heavier.candidates)
    assert len(heavier.candidates) < len(plain.candidates)
    with pytest.raises(PlanError, match="needs"):
        solve(replace(problem, calibration=calibration(memory=50.0))).choose()


def test_without_a_calibration_nothing_is_scaled(problem: Problem) -> None:
    one = solve(replace(problem, calibration=calibration()))
    assert [c.plan for c in one.candidates] == [c.plan for c in solve(problem).candidates]
    assert isinstance(problem.cluster, ClusterSpec)
