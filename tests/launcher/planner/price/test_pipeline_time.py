"""Pipelines in the step time: the bubble against the schedule block by block, slow stages, messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.efficiency import Efficiency
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.cost import MemoryCost, TimeCost
from launcher.planner.price.collectives import groups_of
from launcher.planner.price.compute import stage_seconds
from launcher.planner.price.schedule import schedule
from launcher.planner.price.stage_costs import all_stages
from launcher.planner.price.stages import stages_of
from launcher.planner.price.step_time import StepTimer
from strategies.base import Execution, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

# The head of so few words costs next to nothing: without a pipeline split, all stages are equal.
MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=8,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=11008,
    vocab_size=64,
    max_position_embeddings=8192,
)
WORDY = replace(MODEL, vocab_size=128256)
TRAINING = TrainingSpec(sequence_length=8192, global_batch_size=64, num_steps=10)
MESSAGE = 8192 * 4096 * 2  # bytes of hidden states
STATE = StateBytes(weights=2, gradients=4, optimizer=12)
NO_MEMORY = MemoryCost(weights=0, gradients=0, optimizer=0, activations=0, logits=0, buffers=0)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=4,
    gpus_per_node=8,
    gpu=GpuSpec(
        name="G",
        memory_gib=80.0,
        memory_gb_per_s=2000.0,
        peak_tflops={"bf16": 300.0},
        efficiency=Efficiency(overlap=1.0),
    ),
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
EXECUTION = Execution(fused_kernels=True)


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1, "num_microbatches": 8}
    return Plan(**(defaults | values))


def timer_of(model: ModelSpec = MODEL, execution: Execution = EXECUTION) -> StepTimer:
    return StepTimer(model, training=TRAINING, cluster=CLUSTER, execution=execution)


def timed(model: ModelSpec = MODEL, execution: Execution = EXECUTION, **values: Any) -> TimeCost:
    plan = plan_of(**values)
    stages = stages_of(model, plan)
    return timer_of(model, execution).step(plan, state=STATE, memory=NO_MEMORY, stages=stages)


@pytest.mark.parametrize(("pp", "vp", "count"), [(2, 1, 4), (4, 1, 16), (4, 2, 16), (8, 1, 3)])
def test_the_bubble_of_equal_stages(pp: int, vp: int, count: int) -> None:
    """Narayanan et al. 2021: (p - 1) / m of the working time, over v when interleaved."""
    time = timed(pp=pp, vp=vp, num_microbatches=count)
    assert time.bubble == pytest.approx(time.compute * (pp - 1) / (vp * count), rel=1e-2)


def test_the_slowest_stage_sets_the_pace() -> None:
    one = timed(pp=4, num_microbatches=1).compute / 2  # one layer
    time = timed(pp=4, num_microbatches=16, pipeline_split=(2, 1, 2, 3))
    assert time.compute == pytest.approx(16 * 3 * one, rel=1e-2)
    assert time.bubble == pytest.approx(5 * one, rel=1e-2)
    assert timed(WORDY, pp=2).compute > 1.1 * timed(pp=2).compute


def simulated(model: ModelSpec, plan: Plan) -> tuple[float, float]:
    """Return the seconds of the block by block schedule, and of the formula."""
    timer = timer_of(model)
    forward, backward = zip(
        *(stage_seconds(timer.compute, plan, stage) for stage in all_stages(model, plan)), strict=True
    )
    blocks = schedule(
        forward_s=[seconds / plan.vp for seconds in forward],
        backward_s=[seconds / plan.vp for seconds in backward],
        num_microbatches=plan.num_microbatches,
        chunks=plan.vp,
    )
    return max(block.end_s for block in blocks), timer.floor_s(plan, stages_of(model, plan))


@pytest.mark.parametrize(("pp", "vp"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("rounds", [1, 2, 6])
@pytest.mark.parametrize("model", [MODEL, WORDY])
def test_the_bubble_is_that_of_the_schedule(pp: int, vp: int, rounds: int, model: ModelSpec) -> None:
    """Where all stages are equal, or the last one is the slowest, as the head makes it."""
    schedule_s, formula_s = simulated(model, plan_of(pp=pp, vp=vp, num_microbatches=rounds * pp))
    assert formula_s == pytest.approx(schedule_s, rel=2e-3)


@pytest.mark.parametrize("split", [(3, 1, 2, 2), (2, 3, 2, 1), (1, 3, 3, 1), (2, 2, 1, 3)])
@pytest.mark.parametrize("count", [1, 4, 8, 64])
def test_a_slow_stage_further_ahead_waits_less_than_the_formula_says(
    split: tuple[int, ...], count: int
) -> None:
    """It works on later micro-batches while the others have its earlier ones: the formula is an upper bound."""
    plan = plan_of(pp=4, num_microbatches=count, pipeline_split=split)
    schedule_s, formula_s = simulated(MODEL, plan)
    assert schedule_s * 0.999 <= formula_s <= schedule_s * (1.25 if count < 64 else 1.03)


def test_messages_cross_each_border_once_a_pass() -> None:
    send = groups_of(CLUSTER, plan_of(pp=4))["pp"].send_s(MESSAGE)
    assert timed(pp=4).pp == pytest.approx((2 * 8 + 2 * 3) * send)
    assert timed(pp=4, vp=2).pp == pytest.approx((2 * 2 * 8 + 2 * 3) * send)
    hidden = replace(EXECUTION, overlap_pp=True)
    assert timed(execution=hidden, pp=4).pp == pytest.approx(2 * 3 * send)


@pytest.mark.parametrize(
    ("split_messages", "sequence_parallel", "parts_sent"),
    [(True, False, 4), (False, False, 1), (False, True, 4)],
)
def test_tensor_parallel_ranks_share_a_message(
    split_messages: bool, sequence_parallel: bool, parts_sent: int
) -> None:
    execution = replace(EXECUTION, split_messages=split_messages)
    time = timed(execution=execution, tp=4, pp=2, sequence_parallel=sequence_parallel)
    send = groups_of(CLUSTER, plan_of(tp=4, pp=2))["pp"].send_s(MESSAGE / parts_sent)
    assert time.pp == pytest.approx((2 * 8 + 2) * send)
