"""Step time by part: each part appears with its cause, in the size that its source states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.cost import TimeCost, parts
from launcher.planner.memory import stage_memory
from launcher.planner.stages import stages_of
from launcher.planner.step_time import step_time
from strategies.base import StateBytes
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=8,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=8192,
)
TRAINING = TrainingSpec(sequence_length=8192, global_batch_size=64, num_steps=10)
STATE = StateBytes(weights=2, gradients=4, optimizer=12)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=4,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)


def timed(
    model: ModelSpec = MODEL, cluster: ClusterSpec = CLUSTER, state: StateBytes = STATE, **values: Any
) -> TimeCost:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1, "num_microbatches": 8}
    plan = Plan(**(defaults | values))
    stages = stages_of(model, plan)
    memory, host = stage_memory(model, plan=plan, training=TRAINING, state=state, stage=stages[0])
    return step_time(
        model,
        plan=plan,
        training=TRAINING,
        cluster=cluster,
        state=state,
        memory=memory,
        host_bytes=host,
        stages=stages,
    )


def test_one_rank_only_computes() -> None:
    assert {name for name, value in parts(timed()).items() if value} == {"compute", "optimizer"}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"tp": 2}, "tp"),
        ({"pp": 2}, "pp"),
        ({"pp": 2}, "bubble"),
        ({"dp": 2}, "dp"),
        ({"recompute": "full"}, "recompute"),
        ({"recompute": "selective"}, "recompute"),
        ({"zero_stage": 1, "dp": 2, "offload_optimizer": True}, "offload"),
    ],
)
def test_every_cost_has_its_cause(values: dict[str, Any], part: str) -> None:
    assert parts(timed())[part] == 0
    assert parts(timed(**values))[part] > 0


def test_experts_travel_only_with_expert_parallelism() -> None:
    moe = replace(MODEL, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=1024))
    assert timed(moe, dp=8).ep == 0
    assert timed(moe, dp=8, ep=8).ep > 0


def test_ring_attention_shows_only_where_links_are_slow() -> None:
    slow = replace(CLUSTER, links=(Link(size=None, gb_per_s=0.5, latency_us=15.0),))
    assert timed(cp=2).cp == 0
    assert timed(cluster=slow, cp=2).cp > 0


def test_full_recomputation_repeats_the_forward_pass_of_the_layers() -> None:
    time = timed(recompute="full")
    assert 0.28 * time.compute < time.recompute < time.compute / 3


def test_the_bubble_is_that_of_the_schedule() -> None:
    """Narayanan et al. 2021: (p - 1) / m of the working time, over v when interleaved."""
    time = timed(pp=4, num_microbatches=16)
    assert time.bubble == pytest.approx(time.compute * 3 / 16)
    chunked = timed(pp=4, vp=2, num_microbatches=16)
    assert chunked.bubble == pytest.approx(chunked.compute * 3 / 16 / 2)


def test_the_slowest_stage_sets_the_pace() -> None:
    wide = replace(MODEL, vocab_size=256000)
    assert timed(wide, pp=2).compute > 1.2 * timed(pp=2).compute


def test_slower_links_never_help() -> None:
    slow = replace(CLUSTER, links=tuple(replace(link, gb_per_s=link.gb_per_s / 10) for link in CLUSTER.links))
    layouts: list[dict[str, Any]] = [
        {"dp": 32},
        {"dp": 32, "zero_stage": 3},
        {"dp": 4, "tp": 8},
        {"dp": 8, "pp": 4},
    ]
    for values in layouts:
        assert timed(cluster=slow, **values).total > timed(**values).total


def test_sharded_stages_communicate_more() -> None:
    by_stage = [timed(dp=32, zero_stage=stage).dp for stage in (0, 1, 2, 3)]
    assert by_stage[3] > by_stage[0]
    assert by_stage[2] > by_stage[1]  # gradients are reduced after every micro-batch


# 1000 s a hop, so that nothing hides it and everything else vanishes. Four ranks: three hops round the ring, two
# levels up the tree; eight layers, eight micro-batches.
FAR = replace(CLUSTER, links=(Link(size=None, gb_per_s=1e6, latency_us=1e9),))
RING_S, TREE_S = 8 * 3 * 1000, 2 * 8 * 2 * 1000
REGATHERS = replace(STATE, regathers=True)
WHOLE = replace(STATE, whole_gradients=True)


@pytest.mark.parametrize(
    ("stage", "state", "expected"),
    [
        (0, STATE, TREE_S),
        (1, STATE, 2 * RING_S),  # one reduction, one gather
        (2, STATE, 8 * RING_S + RING_S),  # a reduction a micro-batch
        (2, REGATHERS, 8 * (RING_S + RING_S)),  # and a gather
        (2, WHOLE, RING_S + RING_S),
        (3, STATE, 8 * 3 * RING_S),  # two gathers and a reduction
        (3, WHOLE, 8 * 2 * RING_S + RING_S),
    ],
)
def test_latency_is_that_of_one_collective_a_layer(stage: int, state: StateBytes, expected: float) -> None:
    time = timed(cluster=FAR, state=state, dp=4, zero_stage=stage)
    assert time.dp == pytest.approx(expected, rel=2e-3)
