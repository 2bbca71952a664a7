"""Plan, model and training to Megatron-core's words against golden files; Megatron-core itself takes them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.decode import decode
from strategies.megatron import CAPABILITIES, network
from strategies.megatron.settings import Extensions, Settings, to_settings
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "megatron"
TRAINING = TrainingSpec(sequence_length=4096, global_batch_size=512, num_steps=100)
ON_GPU = Extensions(transformer_engine=True, fused_accumulation=True)
# Name -> (preset of hydra_configs/model, plan, extensions).
CASES: dict[str, tuple[str, dict[str, Any], Extensions]] = {
    "llama3_70b_tp8_pp4": (
        "llama3_70b",
        {"dp": 2, "tp": 8, "pp": 4, "sequence_parallel": True, "zero_stage": 1},
        ON_GPU,
    ),
    "llama3_8b_vp2_cp2_block": (
        "llama3_8b",
        {
            **{"dp": 2, "pp": 2, "vp": 2, "cp": 2, "num_microbatches": 2},
            **{"recompute": "full", "recompute_num_layers": 4, "rank_order": ("tp", "cp", "pp", "dp")},
        },
        Extensions(),
    ),
    "llama3_8b_uneven": ("llama3_8b", {"dp": 1, "pp": 4, "pipeline_split": (8, 9, 9, 6)}, Extensions()),
    "gpt2_fp32": ("gpt2_124m", {"dp": 4, "precision": "fp32", "recompute": "full"}, Extensions()),
    "gpt2_fp16_selective": (
        "gpt2_124m",
        {"dp": 2, "tp": 2, "precision": "fp16", "recompute": "selective"},
        Extensions(),
    ),
    "mixtral_ep8": ("mixtral_8x7b", {"dp": 8, "ep": 8, "zero_stage": 1}, ON_GPU),
    "qwen3_moe_ep8_etp1_tp2": (
        "qwen3_30b_a3b",
        {"dp": 8, "tp": 2, "ep": 8, "sequence_parallel": True},
        Extensions(),
    ),
    "deepseek_v3_ep8_pp8_fp8": (
        "deepseek_v3",
        {
            **{"dp": 8, "pp": 8, "ep": 8, "precision": "fp8", "zero_stage": 1},
            **{"recompute": "selective", "recompute_modules": ("mla_up_proj", "moe_act")},
        },
        ON_GPU,
    ),
    "engine_keys": (
        "llama3_8b",
        {
            "dp": 8,
            "engine": {"transformer": {"persist_layer_norm": True}, "ddp": {"bucket_size": 10_000_000}},
        },
        Extensions(),
    ),
}


def preset(name: str) -> ModelSpec:
    path = ROOT / "hydra_configs" / "model" / f"{name}.yaml"
    return decode(ModelSpec, yaml.safe_load(path.read_text(encoding="utf-8")), "model")


def settings_of(name: str) -> Settings:
    model, plan, extensions = CASES[name]
    return to_settings(
        Plan(**{"strategy": "megatron", **plan}), preset(model), TRAINING, extensions=extensions
    )


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(asdict(settings_of(name)))) == golden


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] == Extensions()])
def test_megatron_core_takes_it(name: str) -> None:
    """Its own checks run when a configuration is made; those for Transformer Engine need it installed."""
    network.prepare()
    settings = settings_of(name)
    config = network.build_config(settings)
    assert config.num_layers == preset(CASES[name][0]).num_layers
    assert config.params_dtype.itemsize == (4 if "fp32" in name else 2)


def test_every_plan_that_is_allowed_can_be_said() -> None:
    for name, (_, plan, _) in CASES.items():
        assert CAPABILITIES.why_not(Plan(**{"strategy": "megatron", **plan})) is None, name


def test_an_interleaved_schedule_never_batches_its_messages() -> None:
    """Batched sends between two ranks change places there, and the loss is wrong without a word."""
    for vp in (1, 2, 4):
        plan = Plan(strategy="megatron", dp=1, pp=2, vp=vp)
        words = to_settings(plan, preset("llama3_8b"), TRAINING).transformer
        assert (words["batch_p2p_comm"], words["overlap_p2p_comm"]) == (
            (True, False) if vp == 1 else (False, True)
        )


def test_the_vocabulary_is_padded_for_every_rank() -> None:
    model = preset("gpt2_124m")

    def rows(model: ModelSpec, *, tp: int) -> int:
        settings = to_settings(Plan(strategy="megatron", dp=1, tp=tp), model, TRAINING)
        return int(settings.model["vocab_size"])

    assert rows(model, tp=1) == 50304
    assert rows(model, tp=4) == 50688
    assert rows(replace(model, vocab_size=512), tp=4) == 512


def test_a_window_counts_only_where_it_cuts() -> None:
    model, plan = replace(preset("llama3_8b"), sliding_window=4096), Plan(strategy="megatron", dp=1)
    assert to_settings(plan, model, TRAINING).transformer["window_size"] is None
    longer = replace(TRAINING, sequence_length=8192)
    assert to_settings(plan, model, longer).transformer["window_size"] == [4095, 0]


def test_without_clipping_the_norm_is_still_computed() -> None:
    settings = to_settings(
        Plan(strategy="megatron", dp=1), preset("gpt2_124m"), replace(TRAINING, max_grad_norm=0)
    )
    assert settings.optimizer["clip_grad"] == float("inf")


GROUPED = MoeSpec(num_experts=8, top_k=3, expert_ffn_hidden_size=64, num_groups=4, num_active_groups=2)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"attention_bias": True, "attention_output_bias": True},
        {},
        r"model\.mlp_bias=False with model\.attention_output",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {},
        r"model\.rope_scaling=.*linear.*strategy=accelerate",
    ),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2}},
        {},
        r"model\.rope_scaling=.*is not one that Megatron-core computes",
    ),
    (
        {"model_type": "deepseek_v3", "moe": GROUPED, "norm_eps": 1e-6},
        {},
        r"model\.moe\.top_k=3 is not possible",
    ),
    (
        {"model_type": "deepseek_v3", "moe": replace(GROUPED, top_k=4)},
        {},
        r"model\.norm_eps=1e-05 is not possible in Megatron-core for model\.model_type=deepseek_v3",
    ),
    (
        {},
        {"pp": 2, "vp": 2, "recompute": "full", "recompute_num_layers": 3},
        r"plan\.recompute_num_layers=3 is not a multiple of plan\.vp=2",
    ),
]


@pytest.mark.parametrize(("shape", "changes", "sentence"), REFUSED)
def test_what_cannot_be_said_is_refused(
    shape: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    plan = Plan(**{"strategy": "megatron", "dp": 1, **changes})
    with pytest.raises(ValueError, match=sentence):
        to_settings(plan, replace(preset("llama3_8b"), **shape), TRAINING)
