"""What the planner may ask of Megatron-core, and the sentences for what it may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.megatron import CAPABILITIES
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan

PLAN = Plan(strategy="megatron", dp=4, tp=2, sequence_parallel=True)
DENSE = ModelSpec(
    name="tiny",
    model_type="mixtral",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
)
MIXTURE = replace(DENSE, moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=32))

ALLOWED: list[dict[str, Any]] = [
    {},
    {"pp": 4, "vp": 2, "cp": 2, "ep": 4, "etp": 2, "zero_stage": 1},
    {"recompute": "full", "recompute_num_layers": 3},
    {"recompute": "selective", "recompute_modules": ("core_attn", "mla_up_proj", "moe_act")},
    {"pp": 2, "pipeline_split": (3, 5)},
    {"pp": 2, "rank_order": ("tp", "cp", "pp", "dp")},
    {"precision": "fp8"},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_stage": 2}, "megatron has no plan.zero_stage=2; use one of 0, 1"),
    ({"zero_stage": 3}, "megatron has no plan.zero_stage=3; use one of 0, 1"),
    (
        {"tp": 1},
        "megatron has no plan.sequence_parallel=true with plan.tp=1 (model_parallel_config.py); "
        "use plan.sequence_parallel=false, or plan.tp above 1",
    ),
    (
        {"offload_optimizer": True},
        "megatron cannot combine plan.offload_optimizer=true with plan.zero_stage=0; use plan.offload_optimizer=false",
    ),
    (
        {"rank_order": ("dp", "tp", "cp", "pp")},
        "megatron cannot place its ranks as plan.rank_order=[dp,tp,cp,pp]; use [tp,cp,dp,pp] or [tp,cp,pp,dp]",
    ),
    (
        {"recompute": "selective", "recompute_modules": ("attention",)},
        "megatron cannot recompute attention alone (plan.recompute_modules); "
        "use some of core_attn, layernorm, mla_up_proj, mlp, moe, moe_act",
    ),
    (
        {"recompute": "none", "recompute_num_layers": 2},
        "megatron has no plan.recompute_num_layers=2 with plan.recompute=none; use plan.recompute=full",
    ),
]


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_what_it_can_do(changes: dict[str, Any]) -> None:
    assert CAPABILITIES.why_not(replace(PLAN, **changes)) is None


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence[:60] for _, sentence in REFUSED])
def test_what_it_cannot_do(changes: dict[str, Any], sentence: str) -> None:
    assert CAPABILITIES.why_not(replace(PLAN, **changes)) == sentence


def test_experts_on_tensor_parallel_ranks_want_sequence_parallelism() -> None:
    plan = replace(PLAN, sequence_parallel=False)
    assert CAPABILITIES.why_not(plan, DENSE) is None
    assert CAPABILITIES.why_not(PLAN, MIXTURE) is None
    assert CAPABILITIES.why_not(plan, MIXTURE) == (
        "megatron cannot train experts with plan.tp=2 and plan.sequence_parallel=false; "
        "use plan.sequence_parallel=true, or plan.tp=1"
    )


def test_its_states_take_18_bytes_in_16_bits_and_16_in_32() -> None:
    for precision in CAPABILITIES.precisions:
        state = CAPABILITIES.state_bytes_of(replace(PLAN, precision=precision))  # type: ignore[arg-type]
        total = state.weights + state.gradients + state.optimizer
        assert total == (16 if precision == "fp32" else 18)
