"""Every engine's best plan beside the choice: the same as planning for each engine alone, and all together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import strategies
from launcher.errors import PlanError
from launcher.planner.cost import GIB
from launcher.planner.search.ranking import PlanRequest, Problem, Ranking, solve
from launcher.planner.words import by_engine

ABSENT = {"colossalai": "meshwright env create colossalai"}


@pytest.fixture
def problem(dense: Ranking) -> Problem:
    """An 8B model on two nodes: small spaces of some engines, a large one of Megatron-core."""
    return replace(
        dense.problem,
        cluster=replace(dense.problem.cluster, num_nodes=2),
        strategies=tuple(strategies.engines()),
    )


def alone(problem: Problem, name: str) -> Any:
    try:
        candidates = solve(replace(problem, strategies=(name,))).candidates
    except PlanError:
        return None
    return candidates[0] if candidates else None


@pytest.mark.parametrize(
    "asked", [("accelerate",), ("megatron",), ("accelerate", "deepspeed"), ("accelerate", "megatron"), ()]
)
@pytest.mark.parametrize(
    "request_", [PlanRequest(), PlanRequest(recompute="full"), PlanRequest(micro_batch_size=2)]
)
def test_whatever_is_asked_the_entries_are_what_each_engine_alone_would_choose(
    problem: Problem, asked: tuple[str, ...], request_: PlanRequest
) -> None:
    problem = replace(problem, request=request_)
    ranking = solve(replace(problem, strategies=asked or problem.strategies))
    chosen, found = ranking.choose(), by_engine.contest(ranking)
    assert {entry.strategy for entry in found.entries} == set(strategies.engines())
    assert found.entries[0].strategy == solve(problem).choose().plan.strategy
    for entry in found.entries:
        is_chosen = entry.strategy == chosen.plan.strategy
        assert entry.candidate == (chosen if is_chosen else alone(problem, entry.strategy))
        assert bool(entry.reason) == (entry is not found.entries[0])


def test_the_row_of_the_engine_asked_is_the_chosen_plan(problem: Problem) -> None:
    ranking = solve(replace(problem, strategies=("accelerate", "deepspeed")))
    found = by_engine.contest(ranking)
    chosen = ranking.choose()
    assert next(e for e in found.entries if e.strategy == chosen.plan.strategy).candidate is chosen
    assert found.ranking is ranking


def test_an_engine_without_a_plan_says_why(problem: Problem) -> None:
    tensor = replace(problem, request=PlanRequest(tp=2), strategies=("megatron",))
    found = {entry.strategy: entry for entry in by_engine.contest(solve(tensor)).entries}
    assert found["accelerate"].candidate is None
    assert "strategy=accelerate" in found["accelerate"].reason
    assert "plan.tp" in found["accelerate"].reason

    stage = replace(problem, request=PlanRequest(zero_stage=0, recompute="none"), strategies=("megatron",))
    found = {entry.strategy: entry for entry in by_engine.contest(solve(stage)).entries}
    assert found["accelerate"].reason.startswith("no plan fits; the nearest, dp=16 zero_stage=0 ")
    assert "GiB per GPU" in found["accelerate"].reason


def test_keys_of_one_engine_are_not_passed_to_another(problem: Problem) -> None:
    keys = {"zero_optimization": {"sub_group_size": 1000}}
    ranking = solve(replace(problem, strategies=("deepspeed",), engine=keys))
    for entry in by_engine.contest(ranking).entries:
        assert entry.candidate is not None
        assert entry.candidate.plan.engine == (keys if entry.strategy == "deepspeed" else {})


def test_time_memory_or_simplicity_tell_why_the_winner_wins(
    dense: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dense.candidates[0]
    assert first.cost is not None
    time, memory = first.cost.time, first.cost.memory
    heavy = replace(memory, activations=memory.activations + 20 * GIB)
    others = {
        "accelerate": replace(first, cost=replace(first.cost, time=replace(time, dp=time.dp + 2.0))),
        "deepspeed": replace(first, cost=replace(first.cost, memory=heavy)),
        "megatron": replace(first, plan=replace(first.plan, num_microbatches=16)),
    }

    def solve_one(problem: Problem, *, only_best: bool) -> Ranking:
        assert only_best
        (name,) = problem.strategies
        if name not in others:
            raise PlanError(f"strategy={name} knows no such model")
        other = replace(others[name], plan=replace(others[name].plan, strategy=name))
        return replace(dense, problem=problem, candidates=(other,))

    monkeypatch.setattr(by_engine, "solve", solve_one)
    only = replace(dense, problem=replace(dense.problem, strategies=("fake",)), candidates=(first,))
    found = by_engine.contest(only)
    reasons = {entry.strategy: entry.reason for entry in found.entries}
    tie = "as fast as fake, but the prediction cannot tell plans within 5.0% of the fastest apart, and "
    assert reasons == {
        "fake": "",
        "deepspeed": f"{tie}of these it needs 20.00 GiB more per GPU than the lightest: activations +20.00 GiB",
        "megatron": f"{tie}fake counts as simpler: strategy=fake instead of megatron, "
        "plan.num_microbatches=8 instead of 16",
        "accelerate": "slower than fake by 2.000 s a step (58.5%): dp +2.000 s",
        "colossalai": "strategy=colossalai knows no such model",
    }
    assert list(reasons) == ["fake", "deepspeed", "megatron", "accelerate", "colossalai"]
    assert found.verdict == "fake is chosen"


def test_text_and_data_tell_the_same(problem: Problem) -> None:
    ranking = solve(replace(problem, strategies=("accelerate",)))
    found = by_engine.contest(ranking)
    text = by_engine.to_text(found, absent=ABSENT)
    winner = found.entries[0].strategy
    assert text.startswith(
        "every engine's best plan (accelerate is chosen because the job asks for accelerate; "
        f"strategy={winner} is predicted to do better):\n  engine "
    )
    data = {entry["strategy"]: entry for entry in by_engine.to_json(found, absent=ABSENT)}
    rows = {line.split()[0]: line for line in text.splitlines()[2:6]}
    for name, entry in data.items():
        assert f"{entry['predictions']['tokens_per_s_per_gpu']:.0f} " in rows[name]
        assert f"micro_batch_size={entry['plan']['micro_batch_size']} " in rows[name]
        assert entry["is_here"] == (name != "colossalai") == (" yes " in rows[name])
        assert entry["is_chosen"] == (name == "accelerate")
        assert not entry["reason"] or f"{name}: {entry['reason']}" in text
    assert data["colossalai"]["install"] == "meshwright env create colossalai"
    assert "no: meshwright env create colossalai" in rows["colossalai"]


def test_without_a_plan_of_the_job_there_is_nothing_to_compare(problem: Problem) -> None:
    little = replace(problem.cluster, gpu=replace(problem.cluster.gpu, memory_gib=6.0))
    with pytest.raises(PlanError, match="no plan of llama_8b"):
        by_engine.contest(solve(replace(problem, cluster=little, strategies=("accelerate",))))
