"""Pins that cannot be meant, and problems that no plan can help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher import compose, freeze
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.config import StrategyConfig
from launcher.decode import decode, encode
from launcher.errors import ConfigError, PlanError
from launcher.planner.problem import PlanRequest, Problem, check_problem, divisors, listed, pinned, text_of
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tp": 0}, "plan.tp=0 must be at least 1; null lets the planner choose"),
    (
        {"recompute_num_layers": -1},
        "plan.recompute_num_layers=-1 must be at least 0; null lets the planner choose",
    ),
    ({"zero_stage": 4}, "plan.zero_stage=4 is not a ZeRO stage; use one of 0, 1, 2, 3"),
    (
        {"recompute": "none", "recompute_num_layers": 2},
        "plan.recompute_num_layers=2 has no effect with plan.recompute=none; use plan.recompute=full or null",
    ),
    (
        {"recompute": "full", "recompute_modules": ["mlp", "moe"]},
        "plan.recompute_modules=[mlp,moe] has no effect with plan.recompute=full; "
        "use plan.recompute=selective or null",
    ),
    ({"rank_order": ["tp", "dp"]}, "plan.rank_order=[tp,dp] must name each of cp, dp, pp, tp once"),
    ({"pipeline_split": [-1, 5]}, "plan.pipeline_split=[-1,5] must name the layers of each chunk"),
    (
        {"pipeline_split": [4, 4, 4], "pp": 2},
        "plan.pipeline_split=[4,4,4] names 3 chunks, not plan.pp * plan.vp; "
        "set plan.pp and plan.vp to null, or name as many",
    ),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG, ids=[sentence[:50] for _, sentence in WRONG])
def test_pins_that_cannot_be_meant(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(PlanRequest, given, "plan")
    assert str(error.value) == sentence


def test_pins_are_what_is_not_null() -> None:
    request = PlanRequest(tp=2, pipeline_split=(3, 5), sequence_parallel=False)
    assert request.pins() == {"tp": 2, "pipeline_split": (3, 5), "sequence_parallel": False}
    assert decode(PlanRequest, encode(request)) == request


@pytest.mark.parametrize(
    "words",
    [
        ("strategy=any", "model=llama3_8b", "cluster=h100_sxm", "cluster.num_nodes=2"),
        (
            "strategy=megatron",
            "model=llama3_8b",
            "cluster=a100_80gb",
            "cluster.num_nodes=3",
            "training.global_batch_size=96",
        ),
        (
            "strategy=megatron",
            "model=llama3_70b",
            "cluster=h100_sxm",
            "cluster.num_nodes=4",
            "plan.recompute=full",
        ),
        ("strategy=deepspeed", "model=mixtral_8x7b", "cluster=a100_80gb", "cluster.num_nodes=8"),
    ],
)
def test_a_pinned_plan_is_the_only_one(words: tuple[str, ...]) -> None:
    (job,) = compose.jobs(words)
    found = freeze.rank(job).candidates[:12]
    assert len(found) > 4
    for plan in (candidate.plan for candidate in found):
        again = freeze.rank(replace(job, strategy=StrategyConfig(name=plan.strategy), plan=pinned(plan)))
        assert [candidate.plan for candidate in again.candidates] == [plan]


def test_a_split_must_hold_all_layers() -> None:
    problem = Problem(
        model=ModelSpec(
            name="m",
            model_type="llama",
            num_layers=12,
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=128,
            vocab_size=1024,
            max_position_embeddings=1024,
        ),
        cluster=ClusterSpec(
            name="c",
            num_nodes=1,
            gpus_per_node=8,
            gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
            links=(Link(size=None, gb_per_s=25.0, latency_us=15.0),),
            host_memory_gib=100.0,
        ),
        training=TrainingSpec(sequence_length=1024, global_batch_size=8, num_steps=10),
        request=PlanRequest(pipeline_split=(5, 6)),
        strategies=("s",),
    )
    with pytest.raises(PlanError) as error:
        check_problem(problem)
    assert str(error.value) == "plan.pipeline_split=[5,6] holds 11 layers, not model.num_layers=12"


def test_values_as_words() -> None:
    assert (text_of(True), text_of((1, 2)), text_of(3)) == ("true", "[1,2]", "3")
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]
    assert listed([1, 2, 3], most=2) == "1, 2, ..."
