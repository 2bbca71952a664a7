from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import strategies
from launcher.config import Job, MemoryRemedy, SuperviseConfig
from launcher.supervise import ladder
from strategies.spec import Plan

PLAN = Plan(
    strategy="deepspeed", dp=2, micro_batch_size=6, num_microbatches=2, zero_stage=1, precision="fp32"
)


def changes(plan: Plan, *steps: MemoryRemedy) -> list[tuple[str, ...]]:
    return [change.words for change in ladder.for_memory(plan, strategies.capabilities(plan.strategy), steps)]


def test_nothing_is_changed_that_was_not_allowed() -> None:
    assert changes(PLAN) == []


@pytest.mark.parametrize(("size", "smaller", "number"), [(6, 3, 4), (3, 1, 6), (2, 1, 4)])
def test_a_micro_batch_is_halved_and_the_global_batch_stays(size: int, smaller: int, number: int) -> None:
    plan = replace(PLAN, micro_batch_size=size)
    (change,) = ladder.for_memory(plan, strategies.capabilities("deepspeed"), ["halve_micro_batch"])
    assert change.words == (f"plan.micro_batch_size={smaller}", f"plan.num_microbatches={number}")
    assert change.plan is not None
    assert change.plan.global_batch_size == plan.global_batch_size


def test_the_steps_come_in_the_order_of_the_configuration() -> None:
    assert changes(PLAN, "offload", "halve_micro_batch") == [
        ("plan.offload_optimizer=true",),  # parameters need stage 3
        ("plan.micro_batch_size=3", "plan.num_microbatches=4"),
    ]
    assert changes(PLAN, "shard_more", "replan") == [("plan.zero_stage=2",), ("plan.zero_stage=3",), ()]


def test_only_what_the_engine_offers_is_tried() -> None:
    accelerate = replace(PLAN, strategy="accelerate", zero_stage=0)
    assert changes(accelerate, "offload") == []
    assert changes(accelerate, "shard_more") == [("plan.zero_stage=2",), ("plan.zero_stage=3",)]
    assert changes(replace(accelerate, dp=1), "shard_more") == []  # nothing to shard over


def test_more_is_recomputed_until_all_is() -> None:
    megatron = replace(PLAN, strategy="megatron", recompute="selective", recompute_modules=("mlp",))
    assert changes(megatron, "more_recompute") == [("plan.recompute=full", "plan.recompute_modules=null")]
    some = replace(megatron, recompute="full", recompute_num_layers=1, recompute_modules=())
    assert changes(some, "more_recompute") == [("plan.recompute_num_layers=null",)]
    assert changes(replace(some, recompute_num_layers=0), "more_recompute") == []


def test_the_smallest_plan_has_no_step_left() -> None:
    smallest = replace(PLAN, micro_batch_size=1, recompute="full", zero_stage=3)
    everything: tuple[MemoryRemedy, ...] = ("halve_micro_batch", "more_recompute", "shard_more", "offload")
    offloaded = replace(smallest, offload_optimizer=True, offload_parameters=True)
    assert changes(offloaded, *everything) == []


def with_policy(job: Job, *steps: Any) -> Job:
    return replace(job, supervise=SuperviseConfig(on_bad_loss=steps))


def test_a_bad_batch_is_left_out(small_job: Job) -> None:
    change = ladder.for_loss(with_policy(small_job, "skip_batch"), sample=40, failed_before=0)
    assert change is not None and change.job is not None
    assert change.words == ("data.skip_samples=[40]",)
    again = ladder.for_loss(change.job, sample=48, failed_before=7)
    assert again is not None and again.job is not None
    assert again.job.data.skip_samples == (40, 48)


def test_the_learning_rate_is_halved_where_leaving_out_did_not_help(small_job: Job) -> None:
    job = with_policy(small_job, "skip_batch", "halve_learning_rate")
    change = ladder.for_loss(job, sample=40, failed_before=1)
    assert change is not None and change.job is not None
    assert change.job.training.learning_rate == job.training.learning_rate / 2
    assert change.job.data == job.data
    assert change.words == (f"training.learning_rate={job.training.learning_rate / 2:g}",)


def test_a_bad_loss_changes_nothing_by_default(small_job: Job) -> None:
    assert ladder.for_loss(small_job, sample=0, failed_before=0) is None
