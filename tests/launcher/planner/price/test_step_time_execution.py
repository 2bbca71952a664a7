"""Step time where engines do the same thing in different ways: `Execution`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.efficiency import Efficiency
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.cost import MemoryCost, TimeCost
from launcher.planner.price.collectives import groups_of
from launcher.planner.price.compute import Compute
from launcher.planner.price.stages import stages_of
from launcher.planner.price.step_time import StepTimer
from strategies.base import Execution, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

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
TRAINING = TrainingSpec(sequence_length=8192, global_batch_size=64, num_steps=10)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=4,
    gpus_per_node=8,
    gpu=GpuSpec(
        name="G",
        memory_gib=80.0,
        memory_gb_per_s=2000.0,
        peak_tflops={"bf16": 300.0},
        efficiency=Efficiency(interference=0),
    ),
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
RING = Execution()
ULYSSES = Execution(heads_over_cp=True)


def plan_of(**degrees: Any) -> Plan:
    return Plan(**{"strategy": "s", "dp": 1, "num_microbatches": 8, **degrees})


def timed(execution: Execution, **degrees: Any) -> TimeCost:
    plan = plan_of(**degrees)
    return StepTimer(MODEL, training=TRAINING, cluster=CLUSTER, execution=execution).step(
        plan,
        state=StateBytes(weights=2, gradients=4, optimizer=12),
        memory=MemoryCost(weights=0, gradients=0, optimizer=0, activations=0, logits=0, buffers=0),
        stages=stages_of(MODEL, plan),
    )


@pytest.mark.parametrize(("cp", "kv_heads"), [(2, 8), (16, 16)])  # sixteen ranks get a key/value head each
def test_ulysses_exchanges_queries_keys_values_and_context_in_the_open(cp: int, kv_heads: int) -> None:
    hidden_states = 8192 / cp * 4096 * 2
    sent = hidden_states * (2 * 32 + 2 * kv_heads) / 32
    exchange = groups_of(CLUSTER, plan_of(cp=cp))["cp"].all_to_all_s(sent, calls=4)
    assert timed(ULYSSES, cp=cp).cp == pytest.approx(8 * 8 * 2 * exchange)


def test_whole_heads_attend_faster_than_a_ring_of_pieces() -> None:
    forward = {
        execution: Compute(MODEL, TRAINING, CLUSTER.gpu, execution).layer(plan_of(cp=4), moe=False).parts
        for execution in (RING, ULYSSES)
    }
    assert forward[ULYSSES]["core_attn"] < forward[RING]["core_attn"]


def test_gradients_of_a_pipeline_may_have_to_wait() -> None:
    late = replace(RING, reduces_after_pipeline=True)
    assert timed(late, dp=2, pp=2).dp > timed(RING, dp=2, pp=2).dp
    assert timed(late, dp=2).dp == timed(RING, dp=2).dp
