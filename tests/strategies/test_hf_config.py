"""The translation to and from config.json, checked against transformers' own classes on the meta device."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import yaml

from launcher.decode import decode
from strategies.hf_config import ARCHITECTURES, from_hf_config, to_hf_config
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec

PRESETS = (
    "debug_tiny",
    "gpt2_124m",
    "gpt3_175b",
    "llama3_8b",
    "llama3_70b",
    "llama3_405b",
    "qwen3_0.6b",
    "mixtral_8x7b",
    "qwen3_30b_a3b",
    "deepseek_v3",
)

_SMALL = ModelSpec(
    name="small",
    model_type="llama",
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=96,
    vocab_size=120,
    max_position_embeddings=64,
    norm_eps=1e-6,
)
_GPT2: dict[str, Any] = {
    "gated_mlp": False,
    "learned_positions": True,
    "norm": "layernorm",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "num_kv_heads": None,
}
_MOE = MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=48, num_dense_layers=1)
FAMILIES = {
    "llama": replace(_SMALL, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "mistral": replace(_SMALL, model_type="mistral", sliding_window=16),
    "qwen2": replace(_SMALL, model_type="qwen2", attention_bias=True, sliding_window=16),
    "qwen3": replace(_SMALL, model_type="qwen3", qk_norm=True, head_dim=32),
    "gpt2": replace(_SMALL, model_type="gpt2", tied_embeddings=True, **_GPT2),
    "mixtral": replace(
        _SMALL, model_type="mixtral", moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=96)
    ),
    "qwen3_moe": replace(_SMALL, model_type="qwen3_moe", qk_norm=True, moe=_MOE),
    "deepseek_v3": replace(
        _SMALL,
        model_type="deepseek_v3",
        num_kv_heads=None,
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        moe=replace(
            _MOE, shared_ffn_hidden_size=96, num_groups=2, num_active_groups=1, routed_scaling_factor=2.5
        ),
        mla=MlaSpec(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    ),
}


def preset(name: str) -> ModelSpec:
    text = (resources.files("hydra_configs") / "model" / f"{name}.yaml").read_text("utf-8")
    return decode(ModelSpec, yaml.safe_load(text), "model")


def count_on_meta(model: ModelSpec) -> int:
    """Parameters of the class that transformers builds, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(model)))
    assert type(built).__name__ == ARCHITECTURES[model.model_type]
    return sum(parameter.numel() for parameter in built.parameters())


def resolved(model: ModelSpec) -> ModelSpec:
    return replace(model, num_kv_heads=model.kv_heads, head_dim=None if model.mla else model.head_size)


def test_every_family_is_covered() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_builds_as_many_parameters_as_we_count(family: str) -> None:
    assert count_on_meta(FAMILIES[family]) == FAMILIES[family].num_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_builds_every_preset_as_we_count_it(name: str) -> None:
    model = preset(name)
    layers = min(model.num_layers, 1 + (model.moe.num_dense_layers if model.moe else 1))
    reduced = replace(model, num_layers=layers)
    assert count_on_meta(reduced) == reduced.num_parameters


@pytest.mark.parametrize("model", [*FAMILIES.values(), *map(preset, PRESETS)], ids=lambda model: model.name)
def test_there_and_back(model: ModelSpec) -> None:
    assert resolved(from_hf_config(to_hf_config(model), name=model.name)) == resolved(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_back(family: str) -> None:
    from transformers import AutoConfig

    model = FAMILIES[family]
    saved = AutoConfig.for_model(**to_hf_config(model)).to_dict()
    found = from_hf_config(saved, name=model.name)
    # transformers adds keys of its own to a scaled rope; ours have to be among them.
    assert model.rope_scaling.items() <= found.rope_scaling.items()
    assert resolved(replace(found, rope_scaling=model.rope_scaling)) == resolved(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_configuration_is_fp32_without_dropout(family: str) -> None:
    config = to_hf_config(FAMILIES[family])
    assert config["dtype"] == "float32"
    assert config["use_cache"] is False
    dropouts = {key: value for key, value in config.items() if "drop" in key}
    assert dropouts
    assert set(dropouts.values()) == {0.0}


def test_the_spelling_of_transformers_4_is_read() -> None:
    config = to_hf_config(preset("llama3_405b"))
    rope = config.pop("rope_parameters")
    old = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": rope["rope_type"], **old}}
    config["torch_dtype"] = config.pop("dtype")
    assert from_hf_config(config, name="llama3_405b") == from_hf_config(
        to_hf_config(preset("llama3_405b")), name="llama3_405b"
    )


def test_a_published_config_json_is_read() -> None:
    """Llama 2 7B, config.json of huggingface.co/meta-llama/Llama-2-7b-hf: 6,738,415,616 parameters."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    }
    model = from_hf_config(config, name="llama2_7b")
    assert model.num_parameters == 6_738_415_616
    assert model.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "bert"}, "model.hf_config: model_type=bert is not a family known here"),
        ({}, "model.hf_config: model_type=None is not a family known here"),
        ({"model_type": "lama"}, "did you mean 'llama'?"),
        ({"model_type": "llama"}, "model.hf_config lacks the key 'num_hidden_layers'"),
        ({"model_type": "gpt2"}, "model.hf_config lacks the key 'n_embd'"),
        ({"model_type": "gpt2", "n_embd": "big"}, "model.hf_config: n_embd='big' is not a whole number"),
        ({"model_type": "llama", "num_hidden_layers": 2.5}, "num_hidden_layers=2.5 is not a whole number"),
        ({"model_type": "llama", "rope_scaling": 2}, "rope_parameters=2 is not a group of keys"),
    ],
)
def test_unreadable_configurations_are_one_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        from_hf_config(config, name="x")
    assert sentence in str(error.value)
    if config.get("model_type") not in ("llama", "gpt2"):
        assert all(family in str(error.value) for family in ARCHITECTURES)


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act=relu"),
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        ("qwen2", {"max_window_layers": 2}, "max_window_layers=2"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_what_a_spec_cannot_hold_is_refused(family: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word.replace("[", r"\[")):
        from_hf_config(to_hf_config(FAMILIES[family]) | changes, name="x")


def test_what_a_family_cannot_express_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.qk_norm=True cannot be expressed .*llama; use False"):
        to_hf_config(replace(_SMALL, qk_norm=True))
    with pytest.raises(ValueError, match=r"model\.norm=layernorm cannot be expressed"):
        to_hf_config(replace(_SMALL, norm="layernorm"))
    with pytest.raises(ValueError, match=r"model\.model_type=bloom is not a family"):
        to_hf_config(replace(_SMALL, model_type="bloom"))
