"""Plan to DeepSpeed JSON against golden files; and the installed DeepSpeed accepts each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategies.deepspeed import CAPABILITIES
from strategies.deepspeed.settings import BUCKET_ELEMENTS, to_deepspeed_config
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "deepspeed"
TRAINING = TrainingSpec(sequence_length=2048, global_batch_size=512, num_steps=100, max_grad_norm=1.0)
LARGE = ModelSpec(
    name="large",
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
)
PLANS: dict[str, dict[str, Any]] = {
    "zero0_fp32": {"zero_stage": 0, "precision": "fp32"},
    "zero0_bf16": {"zero_stage": 0},
    "zero1_bf16": {"zero_stage": 1},
    "zero2_fp32": {"zero_stage": 2, "precision": "fp32"},
    "zero2_bf16_offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero3_bf16": {"zero_stage": 3},
    "zero3_bf16_offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "zero3_engine_keys": {
        "zero_stage": 3,
        "engine": {
            "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000},
            "log_level": "info",
        },
    },
}


def config_of(name: str) -> dict[str, Any]:
    split = {"strategy": "deepspeed", "dp": 8, "micro_batch_size": 4, "num_microbatches": 16}
    return to_deepspeed_config(Plan(**{**split, **PLANS[name]}), LARGE, TRAINING)


@pytest.mark.parametrize("name", PLANS)
def test_golden(name: str) -> None:
    assert config_of(name) == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_deepspeed_reads_it(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    ours = {**config_of(name), "train_batch_size": 64}  # here the world has one rank
    theirs = DeepSpeedConfig(ours)
    assert theirs.zero_optimization_stage == PLANS[name]["zero_stage"]
    assert theirs.gradient_accumulation_steps == 16
    assert theirs.gradient_clipping == 1.0
    assert theirs.zero_force_ds_cpu_optimizer is False


def test_no_bucket_is_larger_than_the_model() -> None:
    tiny = ModelSpec(
        name="tiny",
        model_type="llama",
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=16,
        vocab_size=16,
        max_position_embeddings=16,
    )
    plan = Plan(strategy="deepspeed", dp=1, zero_stage=1)
    assert to_deepspeed_config(plan, tiny, TRAINING)["zero_optimization"]["reduce_bucket_size"] == (
        tiny.num_parameters
    )
    assert CAPABILITIES.buffer_elements == BUCKET_ELEMENTS
