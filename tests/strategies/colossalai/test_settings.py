"""Plan to plugin and arguments against golden files; no engine is needed to read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategies.colossalai.capabilities import CAPABILITIES
from strategies.colossalai.settings import plugin_of, to_plugin_settings, vocabulary_multiple
from strategies.engine_options import check
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "colossalai"
TRAINING = TrainingSpec(sequence_length=2048, global_batch_size=512, num_steps=100, max_grad_norm=1.0)
LARGE: dict[str, Any] = {
    "name": "large",
    "model_type": "llama",
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
PLANS: dict[str, dict[str, Any]] = {
    "zero0_fp32": {"precision": "fp32"},
    "zero1_bf16": {"zero_stage": 1},
    "zero2_fp32_cpu": {"zero_stage": 2, "precision": "fp32"},
    "zero2_bf16_offload": {"zero_stage": 2, "offload_optimizer": True},
    "gemini_bf16": {"zero_stage": 3},
    "gemini_bf16_offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "fsdp_fp32": {"zero_stage": 3, "precision": "fp32"},
    "tp4_sequence_zero1": {"tp": 4, "sequence_parallel": True, "zero_stage": 1},
    "pp4_uneven": {"pp": 4, "pipeline_split": (7, 8, 9, 8)},
    "tp2_pp2_interleaved_cpu": {"tp": 2, "pp": 2, "vp": 2, "rank_order": ("tp", "cp", "dp", "pp")},
    "engine_keys": {
        "zero_stage": 1,
        "tp": 2,
        "engine": {"hybrid_parallel": {"zero_bucket_size_in_m": 4}, "gemini": {"max_prefetch": 1}},
    },
}


def as_plan(name: str) -> Plan:
    split = {"strategy": "colossalai", "dp": 8, "micro_batch_size": 4, "num_microbatches": 16}
    return Plan(**{**split, "rank_order": CAPABILITIES.rank_order, **PLANS[name]})


def settings_of(name: str) -> dict[str, Any]:
    found = to_plugin_settings(
        as_plan(name), ModelSpec(**LARGE), TRAINING, device="cpu" if name.endswith("_cpu") else "cuda"
    )
    return {"plugin": found.plugin, "arguments": dict(found.arguments)}


@pytest.mark.parametrize("name", PLANS)
def test_golden(name: str) -> None:
    assert settings_of(name) == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_every_golden_plan_is_offered(name: str) -> None:
    plan = as_plan(name)
    assert CAPABILITIES.why_not(plan) is None
    check(plan.engine, CAPABILITIES)


def test_wrong_modes_are_never_asked_for() -> None:
    arguments = [settings_of(name)["arguments"] for name in PLANS]
    assert {found.get("sequence_parallelism_mode") for found in arguments} == {None, "split_gather"}
    assert {found.get("pp_style") for found in arguments} == {None, "1f1b", "interleaved"}


def test_without_a_limit_the_norm_is_still_measured() -> None:
    training = TrainingSpec(sequence_length=8, global_batch_size=8, num_steps=1, max_grad_norm=0)
    found = to_plugin_settings(as_plan("zero0_fp32"), ModelSpec(**LARGE), training, device="cuda")
    assert found.arguments["max_norm"] == float("inf")


def test_a_small_model_is_cut_into_chunks_all_the_same() -> None:
    small = ModelSpec(
        **{**LARGE, "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 100}
    )
    found = to_plugin_settings(as_plan("gemini_bf16"), small, TRAINING, device="cuda")
    assert round(found.arguments["min_chunk_size_m"] * 2**20) < small.num_parameters


@pytest.mark.parametrize(
    ("vocabulary", "tp", "multiple"),
    [(32000, 8, 64), (32000, 1, 64), (200, 2, 64), (64, 2, 1), (128, 2, 64), (150, 4, 1)],
)
def test_every_tensor_parallel_rank_gets_real_words(vocabulary: int, tp: int, multiple: int) -> None:
    plan = Plan(strategy="colossalai", dp=1, tp=tp)
    model = ModelSpec(**{**LARGE, "vocab_size": vocabulary})
    assert vocabulary_multiple(plan, model) == multiple
    padded = -(-vocabulary // (multiple * tp)) * multiple * tp
    assert padded // tp * (tp - 1) < vocabulary


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        ("zero0_fp32", "HybridParallelPlugin"),
        ("zero1_bf16", "LowLevelZeroPlugin"),
        ("tp4_sequence_zero1", "HybridParallelPlugin"),
        ("gemini_bf16", "GeminiPlugin"),
        ("fsdp_fp32", "TorchFSDPPlugin"),
    ],
)
def test_plugin(name: str, plugin: str) -> None:
    assert plugin_of(as_plan(name)) == plugin


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (
            {"hybrid_parallel": {"enable_flash_attention": False}},
            "strategy.engine.hybrid_parallel.enable_flash_attention=False is decided by plan.sequence_parallel; "
            "set plan.sequence_parallel and remove this key",
        ),
        (
            {"gemini": {"max_prefetches": 1}},
            "unknown key 'strategy.engine.gemini.max_prefetches'; did you mean",
        ),
    ],
)
def test_engine_keys_are_checked(engine: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"strategy\.engine") as raised:
        check(engine, CAPABILITIES)
    assert str(raised.value).startswith(sentence)
