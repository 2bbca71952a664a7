"""The estimator against the models it joins: the fullest stage, the padded vocabulary, bounds, and what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

import strategies
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.cost import GIB
from launcher.planner.price.estimate import Estimator, usable_bytes
from launcher.planner.price.memory import MemoryModel
from launcher.planner.price.stages import stages_of
from launcher.planner.problem import PlanRequest, Problem
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="m",
    model_type="gpt2",
    num_layers=12,
    hidden_size=1024,
    num_attention_heads=16,
    ffn_hidden_size=4096,
    vocab_size=50257,
    max_position_embeddings=2048,
    gated_mlp=False,
)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=2,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=41.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=100.0,
)
PROBLEM = Problem(
    model=MODEL,
    cluster=CLUSTER,
    training=TrainingSpec(sequence_length=2048, global_batch_size=64, num_steps=10),
    request=PlanRequest(),
    strategies=("megatron",),
)
CAPABILITIES = strategies.capabilities("megatron")
PLAN = Plan(
    strategy="megatron", dp=4, tp=2, pp=2, micro_batch_size=2, num_microbatches=8, sequence_parallel=True
)


def test_the_footprint_is_that_of_the_fullest_stage() -> None:
    estimator = Estimator(PROBLEM, CAPABILITIES)
    padded = replace(MODEL, vocab_size=50432)  # a multiple of 128 * 2
    memory = MemoryModel(padded, PROBLEM.training, CAPABILITIES)
    costs = {stage.index: memory.of(PLAN, stage)[0] for stage in stages_of(padded, PLAN)}
    found = estimator.footprint(PLAN)
    assert found.memory.total == max(cost.total for cost in costs.values())
    assert found.memory == costs[found.stage]
    states = [cost.weights + cost.gradients + cost.optimizer for cost in costs.values()]
    assert estimator.state_bytes(PLAN) == max(states)


def test_an_engine_that_pads_pays_for_it() -> None:
    padding = Estimator(PROBLEM, CAPABILITIES)
    plain = Estimator(PROBLEM, replace(CAPABILITIES, vocabulary_multiple=0))
    assert padding.predict(PLAN).memory.total > plain.predict(PLAN).memory.total
    # FLOPs that count as useful are those of the model as it is.
    assert padding.predict(PLAN).model_flops_per_step == plain.predict(PLAN).model_flops_per_step


def test_a_prediction_does_not_depend_on_what_was_asked_before() -> None:
    used = Estimator(PROBLEM, CAPABILITIES)
    others = [
        replace(PLAN, tp=4, dp=2),
        replace(PLAN, pp=4, dp=2),
        replace(PLAN, vp=3),
        replace(PLAN, pipeline_split=(7, 5)),
        replace(PLAN, zero_stage=1),
        replace(PLAN, recompute="full", recompute_num_layers=2),
        replace(PLAN, micro_batch_size=1, num_microbatches=16),
        replace(PLAN, rank_order=("tp", "cp", "pp", "dp")),
    ]
    for plan in [*others, PLAN, *others]:
        assert used.predict(plan) == Estimator(PROBLEM, CAPABILITIES).predict(plan)


@pytest.mark.parametrize("recompute_num_layers", [0, 1, 3, 6])
def test_bounds_are_below_the_step(recompute_num_layers: int) -> None:
    estimator = Estimator(PROBLEM, CAPABILITIES)
    bounds = estimator.bounds(PLAN)
    full = replace(PLAN, recompute="full", recompute_num_layers=recompute_num_layers)
    share = recompute_num_layers / bounds.layers if recompute_num_layers else 1.0
    assert bounds.layers == 6
    assert estimator.floor_s(PLAN) <= bounds.busy_s < estimator.predict(PLAN).step_s
    assert bounds.busy_s + share * bounds.recompute_s < estimator.predict(full).step_s


def test_too_large_says_by_how_much() -> None:
    usable = usable_bytes(CLUSTER)
    assert usable == 40 * GIB
    estimator = Estimator(PROBLEM, CAPABILITIES)
    footprint = estimator.footprint(PLAN)
    assert estimator.too_large(footprint) is None
    large = replace(footprint, memory=replace(footprint.memory, weights=41 * GIB))
    sentence = estimator.too_large(large)
    assert sentence is not None
    assert sentence.startswith("needs ")
    assert "weights 41.0" in sentence
    assert sentence.endswith("of the 40.0 GiB usable on G")
    hosted = replace(footprint, host_bytes=13 * GIB)
    assert estimator.too_large(hosted) == "offloads 104.0 GiB per node of the cluster.host_memory_gib=100.0"
