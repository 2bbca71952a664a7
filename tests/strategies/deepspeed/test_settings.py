"""Plan to DeepSpeed JSON against golden files; and the installed DeepSpeed accepts each of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strategies.deepspeed import CAPABILITIES
from strategies.deepspeed.settings import (
    BUCKET_ELEMENTS,
    largest_shard,
    partition_words,
    summed_parts,
    swapped_bytes,
    to_deepspeed_config,
    why_not_zero_plus_plus,
)
from strategies.model_spec import ModelSpec, MoeSpec
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
MIXTURE = replace(
    LARGE,
    model_type="mixtral",
    moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=11008, normalize_top_k=False),
)
PARTITION = "partition"
PLANS: dict[str, dict[str, Any]] = {
    "zero0_fp32": {"zero_stage": 0, "precision": "fp32"},
    "zero0_bf16": {"zero_stage": 0},
    "zero1_bf16": {"zero_stage": 1},
    "zero2_fp32": {"zero_stage": 2, "precision": "fp32"},
    "zero2_bf16_offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero3_bf16": {"zero_stage": 3},
    "zero3_bf16_offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "tp8_zero1_bf16": {"zero_stage": 1, "tp": 8},
    "pp4_tp2_zero1_fp32": {"zero_stage": 1, "pp": 4, "tp": 2, "precision": "fp32"},
    "ulysses4_zero3_bf16": {"zero_stage": 3, "cp": 4},
    "mixtral_ep8_zero2_bf16": {"zero_stage": 2, "ep": 8},
    "zero3_bf16_nvme": {
        **{"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        "nvme_path": "/local/disk",
    },
    "zero3_bf16_zero_plus_plus": {
        "zero_stage": 3,
        "engine": {
            "zero_optimization": {
                **{"zero_hpz_partition_size": 8, "zero_quantized_weights": True},
                "zero_quantized_gradients": True,
            }
        },
    },
    "zero3_engine_keys": {
        "zero_stage": 3,
        "engine": {
            "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000},
            "log_level": "info",
        },
    },
}


def plan_of(name: str) -> Plan:
    split = {"strategy": "deepspeed", "dp": 8, "micro_batch_size": 4, "num_microbatches": 16}
    return Plan(**{**split, **PLANS[name]})


def config_of(name: str) -> dict[str, Any]:
    plan = plan_of(name)
    return to_deepspeed_config(plan, LARGE if plan.ep == 1 else MIXTURE, TRAINING)


@pytest.mark.parametrize("name", PLANS)
def test_golden(name: str) -> None:
    assert config_of(name) == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == {*PLANS, PARTITION}


@pytest.mark.parametrize("name", PLANS)
def test_deepspeed_reads_it(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    # Here the world has one rank.
    ours = {**config_of(name), "train_batch_size": 64}
    ours.pop("sequence_parallel_size", None)
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


ZERO_PLUS_PLUS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"zero_quantized_weights": True}, "cuda", None),
    ({"zero_hpz_partition_size": 4}, "cpu", None),
    ({"zero_quantized_weights": True}, "cpu", "zero_quantized_weights=true needs a GPU: "),
    ({"zero_quantized_gradients": True}, "cpu", "zero_quantized_gradients=true needs a GPU: "),
    (
        {"zero_hpz_partition_size": 3},
        "cuda",
        "zero_hpz_partition_size=3 must divide plan.dp * plan.cp=8 and the 8 ",
    ),
]


@pytest.mark.parametrize(("keys", "device", "words"), ZERO_PLUS_PLUS)
def test_zero_plus_plus_where_it_can_be(keys: dict[str, Any], device: str, words: str | None) -> None:
    plan = Plan(strategy="deepspeed", dp=8, zero_stage=3, engine={"zero_optimization": keys})
    refusal = why_not_zero_plus_plus(plan, device=device, local_ranks=8)
    assert (refusal is None) if words is None else (refusal is not None and words in refusal)


def test_what_a_rank_swaps() -> None:
    plan = Plan(
        **{"strategy": "deepspeed", "dp": 8, "zero_stage": 3, "nvme_path": "/local/disk"},
        **{"offload_optimizer": True, "offload_parameters": True},
    )
    assert swapped_bytes(plan, LARGE) == pytest.approx(LARGE.num_parameters / 8 * 18)
    assert largest_shard(plan, LARGE) == 4096 * 32000 // 8  # the table of tokens
    assert MIXTURE.moe is not None
    stacked = 2 * MIXTURE.moe.num_experts * MIXTURE.moe.expert_ffn_hidden_size  # gates and ups of all experts
    assert largest_shard(plan, MIXTURE) == MIXTURE.hidden_size * stacked // 8


def test_partition_golden() -> None:
    assert partition_words() == json.loads((GOLDEN / f"{PARTITION}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_are_cut_as_transformers_would_cut_them(family: str) -> None:
    from deepspeed.module_inject.autotp_config import AutoTPConfig
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from transformers import AutoConfig

    ours = AutoTPConfig.from_dict(partition_words())
    theirs = AutoConfig.for_model(family).base_model_tp_plan
    converted = AutoTPConfig(layer_specs=TPPlanConverter.convert(theirs))
    for pattern in theirs:
        name = f"{pattern.replace('*', '0')}.weight"
        found, expected = ours.find_matching_spec(name), converted.find_matching_spec(name)
        assert (found.partition_type, found.grad_allreduce) == (
            expected.partition_type,
            expected.grad_allreduce,
        )


@pytest.mark.parametrize(
    ("stage", "parts"),
    [(0, 4), (2, 4), (3, 1)],
)
def test_gradients_of_parts_of_a_sequence_are_averaged(stage: int, parts: int) -> None:
    assert summed_parts(Plan(strategy="deepspeed", dp=2, cp=4, zero_stage=stage)) == parts
