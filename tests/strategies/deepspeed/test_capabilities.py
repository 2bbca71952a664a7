"""What the planner may ask of DeepSpeed, and the sentences for what it may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.deepspeed import CAPABILITIES
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan

PLAN = Plan(strategy="deepspeed", dp=4)
DENSE = ModelSpec(
    name="dense",
    model_type="llama",
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=64,
    vocab_size=64,
    max_position_embeddings=32,
)
MIXTURE = replace(DENSE, model_type="mixtral", moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=64))

ALLOWED: list[tuple[ModelSpec, dict[str, Any]]] = [
    *((DENSE, {"tp": 2, "zero_stage": stage}) for stage in range(4)),
    *((DENSE, {"cp": 2, "zero_stage": stage}) for stage in range(4)),
    *((MIXTURE, {"ep": 2, "zero_stage": stage}) for stage in range(4)),
    *((DENSE, {"pp": 2, "tp": 2, "zero_stage": stage}) for stage in range(2)),
    (DENSE, {"pp": 2, "pipeline_split": (3, 1), "recompute": "full"}),
    (DENSE, {"pp": 2, "zero_stage": 1, "offload_optimizer": True}),
    (replace(DENSE, tied_embeddings=True), {"pp": 2, "zero_stage": 1}),
    (DENSE, {"zero_stage": 2, "engine": {"zero_optimization": {"round_robin_gradients": False}}}),
    (replace(DENSE, model_type="gpt2"), {"zero_stage": 3}),
]
HPZ = {"zero_optimization": {"zero_hpz_partition_size": 2}}


def _zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


REFUSED: list[tuple[ModelSpec, dict[str, Any], str]] = [
    (
        DENSE,
        {"zero_stage": 3, "engine": _zero(zero_hpz_partition_size=0)},
        "strategy.engine.zero_optimization.zero_hpz_partition_size=0 must be a number of ranks, at least 1; "
        "1 turns it off",
    ),
    (
        DENSE,
        {"zero_stage": 3, "offload_parameters": True, "nvme_path": "/disk", "engine": HPZ},
        "deepspeed cannot combine strategy.engine.zero_optimization.zero_hpz_partition_size=2 with "
        "plan.offload_parameters=true on plan.nvme_path=/disk; use plan.nvme_path=null, or remove the key",
    ),
    (
        DENSE,
        {"zero_stage": 2, "engine": _zero(round_robin_gradients=True)},
        "deepspeed cannot have round_robin_gradients=True in strategy.engine: checkpoints and exports would find other "
        "tensors' values in its partitions; remove the key",
    ),
    (
        DENSE,
        {"zero_stage": 3, "offload_optimizer": True, "engine": _zero(offload_optimizer={"ratio": 0.5})},
        "deepspeed cannot have ratio=0.5 in strategy.engine: what stays on the device would not follow the schedule of "
        "the learning rate; remove the key",
    ),
    (
        DENSE,
        {"cp": 2, "zero_stage": 3, "engine": _zero(reduce_scatter=False)},
        "deepspeed cannot combine strategy.engine.zero_optimization.reduce_scatter=false with plan.cp=2 "
        "and plan.zero_stage=3; remove the key",
    ),
    (
        replace(DENSE, tied_embeddings=True),
        {"pp": 2, "zero_stage": 1, "offload_optimizer": True},
        "deepspeed lets the two copies of tied embeddings drift apart with plan.pp=2, plan.offload_optimizer=true and "
        "training.precision=bf16; use plan.offload_optimizer=false or plan.pp=1",
    ),
    (
        DENSE,
        {"zero_stage": 2, "engine": HPZ},
        "deepspeed has no use for strategy.engine.zero_optimization.zero_hpz_partition_size=2 with "
        "plan.zero_stage=2; use plan.zero_stage=3, or remove the key",
    ),
    (
        DENSE,
        {"zero_stage": 3, "tp": 2, "engine": HPZ},
        "deepspeed combines strategy.engine.zero_optimization.zero_hpz_partition_size=2 with data and sequence "
        "parallel ranks only; use plan.tp=1 and plan.ep=1, or remove the key",
    ),
    (
        DENSE,
        {"zero_stage": 2, "offload_optimizer": True, "nvme_path": "/disk"},
        "deepspeed cannot offload to plan.nvme_path=/disk with plan.zero_stage=2; use plan.zero_stage in 3",
    ),
    (
        DENSE,
        {"pp": 2, "zero_stage": 2},
        "deepspeed cannot combine plan.zero_stage=2 with plan.pp=2; use plan.zero_stage in 0, 1",
    ),
    (
        DENSE,
        {"cp": 2, "tp": 2},
        "deepspeed does not combine plan.cp=2 with plan.tp=2 here; use plan.cp=1 or plan.tp=1",
    ),
    (
        DENSE,
        {"cp": 2, "pp": 2},
        "deepspeed does not combine plan.cp=2 with plan.pp=2 here; use plan.cp=1 or plan.pp=1",
    ),
    (
        MIXTURE,
        {"ep": 2, "tp": 2},
        "deepspeed does not combine plan.ep=2 with plan.tp=2 here; use plan.ep=1 or plan.tp=1",
    ),
    (
        MIXTURE,
        {"tp": 2},
        "deepspeed has plan.tp=2 for llama, mistral, qwen2, qwen3 only, not for model.model_type=mixtral; "
        "use plan.tp=1",
    ),
    (
        replace(MIXTURE, model_type="deepseek_v3"),
        {"ep": 2},
        "deepspeed has plan.ep=2 for mixtral, qwen3_moe only, not for model.model_type=deepseek_v3; use plan.ep=1",
    ),
    (
        replace(DENSE, model_type="mistral", sliding_window=16),
        {"cp": 2},
        "deepspeed forgets model.sliding_window=16 with plan.cp=2; use plan.cp=1",
    ),
    (DENSE, {"vp": 2, "pp": 2}, "deepspeed does not offer plan.vp=2 here; use plan.vp=1"),
    (
        DENSE,
        {"precision": "fp16"},
        "deepspeed cannot train in training.precision=fp16; use one of bf16, fp32",
    ),
]


@pytest.mark.parametrize(
    ("model", "changes"), ALLOWED, ids=lambda value: getattr(value, "model_type", str(value))
)
def test_what_it_can_do(model: ModelSpec, changes: dict[str, Any]) -> None:
    assert CAPABILITIES.why_not(replace(PLAN, **changes), model) is None


@pytest.mark.parametrize(
    ("model", "changes", "sentence"), REFUSED, ids=[sentence[:70] for *_, sentence in REFUSED]
)
def test_what_it_cannot_do(model: ModelSpec, changes: dict[str, Any], sentence: str) -> None:
    assert CAPABILITIES.why_not(replace(PLAN, **changes), model) == sentence


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offload_is_offered_where_deepspeed_has_it(stage: int) -> None:
    optimizer = Plan(strategy="deepspeed", dp=2, zero_stage=stage, offload_optimizer=True)
    parameters = Plan(strategy="deepspeed", dp=2, zero_stage=stage, offload_parameters=True)
    assert (CAPABILITIES.why_not(optimizer) is None) is (stage > 0)
    assert (CAPABILITIES.why_not(parameters) is None) is (stage == 3)
