"""Step time by part: each part appears with its cause, in the size that its source states."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.efficiency import Efficiency
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.cost import MemoryCost, TimeCost, parts
from launcher.planner.price.collectives import Group, groups_of
from launcher.planner.price.compute import Compute, stage_seconds
from launcher.planner.price.stages import StageShape, stages_of
from launcher.planner.price.step_time import StepTimer
from strategies.base import Execution, StateBytes
from strategies.model_spec import ModelSpec, MoeSpec
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
MOE = replace(MODEL, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=1024))
TRAINING = TrainingSpec(sequence_length=8192, global_batch_size=64, num_steps=10)
MESSAGE = 8192 * 4096 * 2  # bytes of hidden states
STATE = StateBytes(weights=2, gradients=4, optimizer=12)
NO_MEMORY = MemoryCost(weights=0, gradients=0, optimizer=0, activations=0, logits=0, buffers=0)
# What is measured in seconds and microseconds is left out; overlapping is whole.
EFFICIENCY = Efficiency(
    kernel_us=0,
    sharding_us=0,
    moe_stall_ms=0,
    skew_us=0,
    step_ms=0,
    overlap=1,
    interference=0,
    tp_overlap=0.5,
)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=4,
    gpus_per_node=8,
    gpu=GpuSpec(
        name="G",
        memory_gib=80.0,
        memory_gb_per_s=2000.0,
        peak_tflops={"bf16": 300.0, "fp16": 300.0, "fp8": 600.0},
        efficiency=EFFICIENCY,
    ),
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
EXECUTION = Execution(fused_kernels=True)
OPEN = replace(EXECUTION, overlap_gradients=False, overlap_parameters=False)


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1, "num_microbatches": 8}
    return Plan(**(defaults | values))


def timer_of(
    model: ModelSpec = MODEL, cluster: ClusterSpec = CLUSTER, execution: Execution = EXECUTION
) -> StepTimer:
    return StepTimer(model, training=TRAINING, cluster=cluster, execution=execution)


def timed(
    model: ModelSpec = MODEL,
    cluster: ClusterSpec = CLUSTER,
    execution: Execution = EXECUTION,
    state: StateBytes = STATE,
    **values: Any,
) -> TimeCost:
    plan = plan_of(**values)
    timer = timer_of(model, cluster, execution)
    return timer.step(plan, state=state, memory=NO_MEMORY, stages=stages_of(model, plan))


def group(name: str, cluster: ClusterSpec = CLUSTER, **values: Any) -> Group:
    return groups_of(cluster, plan_of(**values))[name]


def layer_s(model: ModelSpec = MODEL, *, moe: bool = False, **values: Any) -> float:
    compute = Compute(model, TRAINING, CLUSTER.gpu, EXECUTION)
    return compute.layer(plan_of(**values), moe=moe).forward


def with_efficiency(**figures: Any) -> ClusterSpec:
    return replace(CLUSTER, gpu=replace(CLUSTER.gpu, efficiency=replace(CLUSTER.gpu.efficiency, **figures)))


def with_links(**changes: Any) -> ClusterSpec:
    return replace(CLUSTER, links=tuple(replace(link, **changes) for link in CLUSTER.links))


def test_one_rank_only_computes() -> None:
    assert {name for name, value in parts(timed()).items() if value} == {"compute"}


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


def test_the_optimizer_passes_over_its_states_and_a_step_has_host_work() -> None:
    memory = replace(NO_MEMORY, weights=1e12, gradients=2e12, optimizer=3e12)
    timer = timer_of(cluster=with_efficiency(step_ms=7.0))
    plan = plan_of()
    time = timer.step(plan, state=STATE, memory=memory, stages=stages_of(MODEL, plan))
    assert time.optimizer == pytest.approx(timer.compute.optimizer(state_bytes=6e12) + 0.007)


# ---- recomputation


def test_full_recomputation_repeats_the_forward_pass_of_the_layers() -> None:
    assert timed(recompute="full").recompute == pytest.approx(8 * 8 * layer_s())
    assert timed(WORDY, recompute="full").recompute == pytest.approx(8 * 8 * layer_s())  # not of the head
    assert timed(MOE, recompute="full").recompute == pytest.approx(8 * 8 * layer_s(MOE, moe=True))


@pytest.mark.parametrize(("layers", "repeated"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_some_layers_of_each_stage_are_recomputed(layers: int, repeated: int) -> None:
    time = timed(pp=2, recompute="full", recompute_num_layers=layers)
    assert time.recompute == pytest.approx(8 * repeated * layer_s())


@pytest.mark.parametrize(
    ("model", "modules", "names"),
    [
        (MODEL, (), ("core_attn",)),
        (MODEL, ("mlp",), ("mlp",)),
        (MODEL, ("core_attn", "layernorm"), ("core_attn", "layernorm")),
        (MODEL, ("moe", "moe_act"), ("moe", "moe_act")),
        (MOE, ("moe", "mlp"), ("moe",)),
    ],
)
def test_selective_recomputation_repeats_what_it_names(
    model: ModelSpec, modules: tuple[str, ...], names: tuple[str, ...]
) -> None:
    layer = Compute(model, TRAINING, CLUSTER.gpu, EXECUTION).layer(plan_of(), moe=model.moe is not None)
    expected = 8 * 8 * sum(layer.parts[name] for name in names)
    time = timed(model, recompute="selective", recompute_modules=modules)
    assert time.recompute == pytest.approx(expected)
    assert 0 <= time.recompute < timed(model, recompute="full").recompute


# ---- tensor, context and expert parallelism


def test_two_all_reduces_a_layer_and_pass() -> None:
    one = group("tp", tp=4).all_reduce_s(MESSAGE)
    # 8 micro-batches, 8 layers, embedding and head count one layer together; forward and backward.
    assert timed(tp=4).tp == pytest.approx(8 * (8 + 1) * 2 * 2 * one)
    # The slower half has four layers and one of the two.
    assert timed(tp=4, pp=2).tp == pytest.approx(8 * (4 + 0.5) * 2 * 2 * one)
    assert timed(tp=4, micro_batch_size=2).tp > 1.5 * timed(tp=4).tp


def test_sequence_parallelism_scatters_and_gathers() -> None:
    one = 2 * group("tp", tp=4).all_gather_s(MESSAGE)
    assert timed(tp=4, sequence_parallel=True).tp == pytest.approx(8 * (8 + 1) * 2 * 2 * one)


def test_ranks_wait_for_the_last_one_and_engines_hide_what_they_can() -> None:
    waits = with_efficiency(skew_us=1e6)
    assert timed(cluster=waits, tp=4).tp - timed(tp=4).tp == pytest.approx(8 * 9 * 2 * 2)
    assert timed(execution=replace(EXECUTION, overlap_tp=True), tp=4).tp == pytest.approx(timed(tp=4).tp / 2)


@pytest.mark.parametrize(("layers", "passes"), [(0, 3), (4, 3), (2, 2.5)])
def test_recomputed_layers_communicate_again(layers: int, passes: float) -> None:
    """In two passes, and in one more for the layers that are repeated, here some or all of four."""
    time = timed(tp=4, pp=2, recompute="full", recompute_num_layers=layers)
    assert time.tp == pytest.approx(timed(tp=4, pp=2).tp * passes / 2)
    assert timed(tp=4, recompute="selective").tp == timed(tp=4).tp


def test_a_fast_ring_hides_behind_attention() -> None:
    assert timed(cp=2).cp == 0
    slow = with_links(gb_per_s=0.1)
    keys = MESSAGE / 2 * 2 * 8 / 32  # keys and values of 8 of 32 heads
    ring = group("cp", slow, cp=2).send_s(keys)
    attention = Compute(MODEL, TRAINING, CLUSTER.gpu, EXECUTION).layer(plan_of(cp=2), moe=False)
    core = attention.parts["core_attn"]
    # Forward: keys and values; backward: these and their gradients, beside 2.5 times the arithmetic.
    assert timed(cluster=slow, cp=2).cp == pytest.approx(8 * 8 * (ring - core + 2 * ring - 2.5 * core))
    assert timed(cluster=slow, cp=4).cp > timed(cluster=slow, cp=2).cp


def test_tokens_travel_to_their_experts_and_back() -> None:
    assert timed(MOE, dp=8).ep == timed(dp=8, ep=8).ep == 0
    one = group("ep", dp=8, ep=8).all_to_all_s(2 * MESSAGE)
    time = timed(MOE, dp=8, ep=8)
    assert time.ep == pytest.approx(8 * 8 * 2 * 2 * one)
    split = group("ep", dp=4, tp=2, ep=4).all_to_all_s(2 * MESSAGE / 2)
    assert timed(MOE, dp=4, tp=2, ep=4).ep == pytest.approx(8 * 8 * 2 * 2 * split)
    learned = replace(EXECUTION, expert_imbalance=1.5)
    assert timed(MOE, execution=learned, dp=8, ep=8).ep == pytest.approx(1.5 * time.ep)
    hidden = replace(EXECUTION, overlap_ep=True)
    assert timed(MOE, execution=hidden, dp=8, ep=8).ep == 0
    some_dense = replace(
        MOE, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=1024, num_dense_layers=6)
    )
    assert timed(some_dense, dp=8, ep=8).ep == pytest.approx(time.ep / 4)


def test_a_token_travels_once_to_a_node_with_several_of_its_experts() -> None:
    many = replace(MODEL, moe=MoeSpec(num_experts=32, top_k=8, expert_ffn_hidden_size=1024))
    once = replace(EXECUTION, deduplicated_dispatch=True)
    assert timed(many, execution=once, dp=32, ep=32).ep < 0.6 * timed(many, dp=32, ep=32).ep


# ---- data parallelism


def stage(model: ModelSpec = MODEL, **values: Any) -> StageShape:
    return stages_of(model, plan_of(**values))[0]


def test_what_nothing_hides_is_exposed() -> None:
    one = group("state", dp=8)
    bytes_sent = stage().parameters * 4
    assert timed(execution=OPEN, dp=8).dp == pytest.approx(one.all_reduce_s(bytes_sent, calls=8))
    gathers = one.all_gather_s(bytes_sent, calls=8) + one.all_gather_s(bytes_sent / 2, calls=8)
    assert timed(execution=OPEN, dp=8, zero_stage=1).dp == pytest.approx(gathers)
    # Loss scaling goes with fp16 on the wire.
    half = one.all_reduce_s(bytes_sent / 2, calls=8)
    assert timed(execution=OPEN, dp=8, precision="fp16").dp == pytest.approx(half)


def test_all_but_the_last_layer_hides_behind_the_backward_pass() -> None:
    whole = timed(execution=OPEN, dp=8).dp
    assert timed(dp=8).dp == pytest.approx(whole / 8)
    assert timed(cluster=with_efficiency(interference=0.5), dp=8).dp == pytest.approx(whole / 8 * 4.5)
    slow = with_links(gb_per_s=1.0)
    plan = plan_of(dp=8)
    _, backward = stage_seconds(timer_of().compute, plan, stage(dp=8))
    exposed = timed(cluster=slow, execution=OPEN, dp=8).dp - backward
    assert timed(cluster=slow, dp=8).dp == pytest.approx(exposed)


def test_sharded_stages_communicate_more() -> None:
    for cluster in (CLUSTER, with_links(gb_per_s=1.0)):
        by_stage = [timed(cluster=cluster, execution=OPEN, dp=32, zero_stage=zero).dp for zero in (1, 2, 3)]
        assert by_stage == sorted(by_stage)
        assert by_stage[2] > 1.3 * by_stage[1] > 1.3 * by_stage[0]
        assert timed(cluster=cluster, dp=32, zero_stage=3).dp < by_stage[2]


# 1000 s a hop, so that nothing hides it and everything else vanishes. Four ranks: three hops round the ring, two
# levels up the tree; eight layers, eight micro-batches.
FAR = replace(CLUSTER, links=(Link(size=None, gb_per_s=1e6, latency_us=1e9),))
RING_S, TREE_S = 8 * 3 * 1000, 2 * 8 * 2 * 1000
REGATHERS = replace(STATE, regathers=True)
WHOLE = replace(STATE, whole_gradients=True)


@pytest.mark.parametrize(
    ("zero", "state", "expected"),
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
def test_latency_is_that_of_one_collective_a_layer(zero: int, state: StateBytes, expected: float) -> None:
    time = timed(cluster=FAR, state=state, dp=4, zero_stage=zero)
    assert time.dp == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("zero", "state", "hooks"),
    [
        (1, STATE, 0),
        (2, STATE, 8 * 2 + 2),  # two buckets for each micro-batch, and for the weights of the step
        (2, REGATHERS, 8 * 9 + 8 * 9),  # eight layers and the root unit, gathered and reduced
        (3, STATE, 8 * 3 * 9),
    ],
)
def test_each_sharded_collective_costs_the_host(zero: int, state: StateBytes, hooks: int) -> None:
    slow = with_efficiency(sharding_us=1e6)
    added = (
        timed(cluster=slow, state=state, dp=4, zero_stage=zero).dp
        - timed(state=state, dp=4, zero_stage=zero).dp
    )
    assert added == pytest.approx(hooks)


def test_frozen_weights_have_no_gradients_and_are_gathered_all_the_same() -> None:
    frozen = replace(EXECUTION, frozen_weights=True)
    assert [timed(execution=frozen, dp=4, zero_stage=zero).dp for zero in (0, 1, 2)] == [0, 0, 0]
    time = timed(cluster=FAR, execution=frozen, dp=4, zero_stage=3)
    assert time.dp == pytest.approx(8 * 2 * RING_S, rel=2e-3)


def test_experts_are_reduced_between_the_ranks_that_hold_the_same() -> None:
    everywhere = stage(MOE, dp=8)
    groups = groups_of(CLUSTER, plan_of(dp=8))
    shared = groups["state"].all_reduce_s(everywhere.parameters * 4, calls=8)
    copied = groups["expert_state"].all_reduce_s(everywhere.expert_parameters * 4, calls=8)
    assert timed(MOE, execution=OPEN, dp=8).dp == pytest.approx(shared + copied)
    assert timed(MOE, execution=OPEN, dp=8, ep=8).dp == pytest.approx(shared)  # each expert lives once
    half = group("expert_state", dp=8, ep=4)
    copied = half.all_reduce_s(stage(MOE, dp=8, ep=4).expert_parameters * 4, calls=8)
    assert half.size == 2
    assert timed(MOE, execution=OPEN, dp=8, ep=4).dp == pytest.approx(shared + copied)


# ---- offloading


def test_offloading_moves_what_a_rank_owns() -> None:
    owned = stage().parameters / 4
    optimizer = owned * (4 + 2) / 20e9 + 2 * owned * 12 / 20e9
    assert timed(dp=4, zero_stage=2, offload_optimizer=True).offload == pytest.approx(optimizer)
    weights = 2 * 8 * owned * 2 / 20e9  # twice a micro-batch
    both = timed(dp=4, zero_stage=3, offload_optimizer=True, offload_parameters=True)
    assert both.offload == pytest.approx(optimizer + weights)
    assert timed(dp=4, offload_optimizer=True).offload == pytest.approx(4 * optimizer)  # not sharded


def test_a_disk_is_read_and_written_beside() -> None:
    owned = stage().parameters / 4
    switches: dict[str, Any] = {
        "dp": 4,
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    }
    on_host, on_disk = (timed(**switches, nvme_path=path).offload for path in (None, "/local/disk"))
    width = 2 * (4 + 12) + (2 * 8 + 1) * 2
    assert on_disk - on_host == pytest.approx(owned * width / 1.6e9)


def test_offloaded_experts_are_those_of_the_rank() -> None:
    one = stage(MOE, dp=8, ep=8)
    owned = one.parameters / 8 + one.expert_parameters  # no other rank holds them
    time = timed(MOE, dp=8, ep=8, zero_stage=2, offload_optimizer=True)
    assert time.offload == pytest.approx(owned * (4 + 2 + 2 * 12) / 20e9)


# ---- the whole


LAYOUTS: list[dict[str, Any]] = [
    {"dp": 32},
    {"dp": 32, "zero_stage": 3},
    {"dp": 4, "tp": 8},
    {"dp": 4, "tp": 8, "sequence_parallel": True},
    {"dp": 8, "pp": 4},
    {"dp": 8, "pp": 4, "pipeline_split": (1, 2, 3, 2)},
    {"dp": 2, "pp": 4, "vp": 2, "tp": 4},
    {"dp": 8, "cp": 4, "zero_stage": 2},
    {"dp": 8, "tp": 2, "cp": 2, "ep": 4, "etp": 2},
    {"dp": 16, "tp": 2, "ep": 8, "zero_stage": 1, "offload_optimizer": True},
]
RECOMPUTE: list[dict[str, Any]] = [
    {},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "full", "recompute_num_layers": 1},
]


@pytest.mark.parametrize("model", [MODEL, WORDY, MOE])
def test_bounds_stay_below_the_step(model: ModelSpec) -> None:
    cluster = replace(CLUSTER, gpu=replace(CLUSTER.gpu, efficiency=Efficiency()))
    for execution, values, more in itertools.product((EXECUTION, OPEN), LAYOUTS, RECOMPUTE):
        timer, plan = timer_of(model, cluster, execution), plan_of(**values, **more)
        stages = stages_of(model, plan)
        time = timer.step(plan, state=STATE, memory=NO_MEMORY, stages=stages)
        busy_s, slowest = timer.busy_s(plan, stages)
        assert slowest in stages
        assert 0 < timer.floor_s(plan, stages) <= busy_s <= time.total * (1 + 1e-12)
        assert min(parts(time).values()) >= 0
        inside = (time.compute, time.recompute, time.tp, time.cp, time.ep, time.bubble)
        assert busy_s == pytest.approx(sum(inside))


@pytest.mark.parametrize("values", LAYOUTS)
def test_slower_links_never_help(values: dict[str, Any]) -> None:
    slow = replace(CLUSTER, links=tuple(replace(link, gb_per_s=link.gb_per_s / 10) for link in CLUSTER.links))
    assert timed(MOE, cluster=slow, **values).total > timed(MOE, **values).total
