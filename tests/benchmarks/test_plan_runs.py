"""Plans that a benchmark runs: every legal one, predicted as asked, and timed in a process of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import plan_runs
from benchmarks.plan_runs import Case, Effort, Measured, Shape
from launcher import compose
from launcher.ranks import Ranks
from strategies.spec import Plan

WORDS = (
    *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.num_kv_heads=2"),
    *("model.ffn_hidden_size=32", "training.sequence_length=8", "training.global_batch_size=4"),
)


@pytest.fixture(scope="module")
def shape() -> Shape:
    [job] = compose.jobs(WORDS)
    return Shape(model=job.model, training=job.training)


def test_legal_plans_are_all_and_fill_the_batch(shape: Shape) -> None:
    cases = list(plan_runs.legal(shape, name="x", strategy="deepspeed", world_size=2))
    assert len(cases) == len({str(case.plan) for case in cases}) == 4 * 2 * 2
    assert {case.plan.zero_stage for case in cases} == {0, 1, 2, 3}
    assert {case.plan.global_batch_size for case in cases} == {4}
    accelerate = plan_runs.legal(shape, name="x", strategy="accelerate", world_size=2)
    assert {case.plan.zero_stage for case in accelerate} == {0, 2, 3}
    megatron = plan_runs.legal(shape, name="x", strategy="megatron", world_size=2)
    assert {(case.plan.zero_stage, case.plan.tp) for case in megatron} == {(0, 1), (1, 1)}


def test_the_planner_is_asked_about_this_plan_only(shape: Shape) -> None:
    [job] = compose.jobs(["cluster=h100_sxm"])
    plan = Plan(strategy="deepspeed", dp=2, zero_stage=1, num_microbatches=2, precision="fp32")
    one = plan_runs.predict(shape, plan, job.cluster)
    more = plan_runs.predict(shape, replace(plan, recompute="full"), job.cluster)
    assert one.num_gpus == 2
    assert more.step_s > one.step_s and more.time.recompute > one.time.recompute == 0


def test_two_plans_run_in_one_process(shape: Shape) -> None:
    cases = [
        Case(
            shape="x",
            plan=Plan(strategy="accelerate", dp=1, micro_batch_size=2, num_microbatches=2, precision="fp32"),
        ),
        Case(shape="x", plan=Plan(strategy="fake", dp=1, num_microbatches=4, precision="fp32")),
    ]
    effort = Effort(num_steps=3, warmup=1)
    found = plan_runs.run({"x": shape}, cases, effort=effort, device="cpu", timeout_s=200)
    assert [len(row.step_s) for row in found] == [3, 3]
    assert all(row.median_s > 0 and row.peak_bytes == 0 for row in found)


def test_the_middle_step_counts() -> None:
    assert Measured(step_s=(5.0, 4.0, 90.0), peak_bytes=0).median_s == 5.0


def test_one_start_has_one_world_size(shape: Shape) -> None:
    cases = [Case(shape="x", plan=Plan(strategy="fake", dp=dp)) for dp in (1, 2)]
    with pytest.raises(AssertionError, match="one world size"):
        plan_runs.run({"x": shape}, cases, effort=Effort(num_steps=1, warmup=0), device="cpu", timeout_s=9)


def test_steps_beside_others_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks(rank=0, world_size=1, local_rank=0)
    shares = iter([0.9, 0.0, 0.5, 0.02, 0.8])
    clock = {"busy": 0.0, "time": 0.0, "used": 0.0}
    monkeypatch.setattr(plan_runs.detect, "count_cores", lambda: 2)
    monkeypatch.setattr(plan_runs, "_busy_s", lambda: clock["busy"])
    monkeypatch.setattr(plan_runs.time, "process_time", lambda: clock["used"])
    monkeypatch.setattr(plan_runs.time, "perf_counter", lambda: clock["time"])

    def step() -> float:
        share = next(shares)
        clock["time"] += 1.0
        clock["used"] += 1.5
        clock["busy"] += 1.5 + 2 * share
        return 1.0 + share

    assert plan_runs._undisturbed(step, alone, 2) == [1.0, 1.02]
    assert list(shares) == [0.8], "no more steps than it takes"


def test_patience_with_a_busy_machine_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter(float(index * 1000) for index in range(100))
    monkeypatch.setattr(plan_runs, "_busy_s", lambda: next(busy))
    calls: list[float] = []

    def step() -> float:
        calls.append(0.0)
        return float(len(calls))

    found = plan_runs._undisturbed(step, Ranks(rank=0, world_size=1, local_rank=0), 2)
    assert (len(found), len(calls)) == (2, 8)
