"""Which plan leads: fast, then light, then with room, then simple."""

from __future__ import annotations

from dataclasses import replace

from launcher.planner.cost import GIB, Candidate, CostBreakdown, MemoryCost, TimeCost
from launcher.planner.search.order import memory_bytes, ordered, simplicity, step_s
from strategies.spec import Plan

PLAN = Plan(strategy="s", dp=8)
USABLE = 100.0 * GIB


def candidate(plan: Plan, *, seconds: float, gib: float) -> Candidate:
    memory = MemoryCost(
        weights=gib * GIB, gradients=0.0, optimizer=0.0, activations=0.0, logits=0.0, buffers=0.0
    )
    rest = dict.fromkeys(("recompute", "tp", "cp", "ep", "pp", "dp", "bubble", "optimizer", "offload"), 0.0)
    cost = CostBreakdown(
        memory=memory,
        host_bytes=0.0,
        disk_bytes=0.0,
        stage=0,
        time=TimeCost(compute=seconds, **rest),
        tokens_per_step=1,
        num_gpus=8,
        model_flops_per_step=1.0,
        peak_flops=None,
    )
    return Candidate(plan=plan, cost=cost)


def test_the_fastest_leads_and_the_rest_follows_by_time() -> None:
    given = [candidate(replace(PLAN, num_microbatches=n), seconds=n, gib=50) for n in (3, 1, 2)]
    found = ordered(given, usable=USABLE)
    assert [step_s(one) for one in found] == [1, 2, 3]
    assert [memory_bytes(one) for one in found] == [50 * GIB] * 3


def test_of_plans_that_cannot_be_told_apart_a_much_lighter_one_leads() -> None:
    fast = candidate(PLAN, seconds=1.0, gib=80)
    light = candidate(replace(PLAN, zero_stage=3), seconds=1.04, gib=60)
    lighter_and_slow = candidate(replace(PLAN, zero_stage=2), seconds=1.06, gib=10)
    assert ordered([fast, light, lighter_and_slow], usable=USABLE) == [light, fast, lighter_and_slow]


def test_a_tenth_of_the_memory_is_no_difference_and_then_the_simplest_leads() -> None:
    fast = candidate(replace(PLAN, zero_stage=3), seconds=1.0, gib=55)
    simple = candidate(PLAN, seconds=1.04, gib=64)
    assert ordered([fast, simple], usable=USABLE)[0] is simple


def test_a_plan_at_the_limit_comes_after_one_with_room() -> None:
    simple = candidate(PLAN, seconds=1.0, gib=95)
    roomy = candidate(replace(PLAN, zero_stage=3), seconds=1.0, gib=89)
    assert ordered([simple, roomy], usable=USABLE)[0] is roomy


def test_nothing_is_ordered_to_nothing() -> None:
    assert ordered([], usable=USABLE) == []


def test_no_two_plans_are_equally_simple() -> None:
    plans = [
        PLAN,
        replace(PLAN, rank_order=("tp", "cp", "pp", "dp")),
        replace(PLAN, recompute="full"),
        replace(PLAN, recompute="full", recompute_num_layers=2),
        replace(PLAN, recompute="selective"),
        replace(PLAN, recompute="selective", recompute_modules=("mlp",)),
        replace(PLAN, pp=2, dp=4),
        replace(PLAN, pp=2, dp=4, pipeline_split=(3, 5)),
        replace(PLAN, ep=2, etp=1),
        replace(PLAN, ep=1, etp=2),
    ]
    assert len({simplicity(plan) for plan in plans}) == len(plans)
