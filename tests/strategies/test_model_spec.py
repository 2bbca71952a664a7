"""ModelSpec: parameter counts against published figures, FLOPs against published formulas, refused shapes."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import yaml

from launcher.decode import decode
from strategies.model_spec import ModelSpec, MoeSpec

TINY = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=128,
    vocab_size=100,
    max_position_embeddings=32,
)


def preset(name: str) -> ModelSpec:
    text = (resources.files("hydra_configs") / "model" / f"{name}.yaml").read_text("utf-8")
    return decode(ModelSpec, yaml.safe_load(text), "model")


# To the parameter, as the weights behind these pages have them.
EXACT = {
    "gpt2_124m": 124_439_808,  # huggingface.co/openai-community/gpt2
    "llama3_8b": 8_030_261_248,  # huggingface.co/meta-llama/Meta-Llama-3-8B
    "llama3_70b": 70_553_706_496,  # huggingface.co/meta-llama/Meta-Llama-3-70B
    "llama3_405b": 405_853_388_800,  # huggingface.co/meta-llama/Llama-3.1-405B
    "qwen3_0.6b": 596_049_920,  # huggingface.co/Qwen/Qwen3-0.6B (751,632,384 there count the tied head twice)
    "mixtral_8x7b": 46_702_792_704,  # huggingface.co/mistralai/Mixtral-8x7B-v0.1
    "qwen3_30b_a3b": 30_532_122_624,  # huggingface.co/Qwen/Qwen3-30B-A3B
}

# Billions as the papers print them: parameters, and parameters that one token passes through.
PRINTED = {
    "gpt3_175b": (175, 175),  # arXiv 2005.14165, table 2.1
    "mixtral_8x7b": (47, 13),  # arXiv 2401.04088, section 1
    "qwen3_30b_a3b": (30.5, 3.3),  # huggingface.co/Qwen/Qwen3-30B-A3B, model overview
    "deepseek_v3": (671, 37),  # arXiv 2412.19437, abstract
}


@pytest.mark.parametrize("name", EXACT)
def test_presets_have_exactly_the_published_number_of_parameters(name: str) -> None:
    assert preset(name).num_parameters == EXACT[name]


@pytest.mark.parametrize("name", PRINTED)
def test_presets_have_the_printed_number_of_parameters(name: str) -> None:
    total, active = PRINTED[name]
    assert preset(name).num_parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert preset(name).num_active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_every_preset_is_checked_here() -> None:
    folder = resources.files("hydra_configs") / "model"
    names = {entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    assert names == EXACT.keys() | PRINTED.keys() | {"debug_tiny"}


def test_flops_follow_the_formula_of_megatron() -> None:
    """Narayanan et al. 2021, equation 3, without recomputation: 72 B s l h^2 (1 + s / 6h + V / 12 l h).

    The paper counts the whole attention matrix; a causal mask needs half, hence s / 12h.
    """
    model, sequence_length = preset("gpt3_175b"), 2048
    layers, hidden, vocab = model.num_layers, model.hidden_size, model.vocab_size
    expected = (
        72 * layers * hidden**2 * (1 + sequence_length / (12 * hidden) + vocab / (12 * layers * hidden))
    )
    assert model.flops_per_token(sequence_length) == pytest.approx(expected, rel=1e-3)


def test_flops_of_a_dense_model_are_about_six_per_parameter() -> None:
    model = preset("llama3_8b")
    # The token table of 128256 * 4096 is looked up, not multiplied.
    matrices = model.num_parameters - model.vocab_size * model.hidden_size
    assert model.flops_per_token(2) == pytest.approx(6 * matrices, rel=1e-3)


def test_a_sliding_window_caps_attention() -> None:
    long = replace(TINY, max_position_embeddings=4096)
    window = replace(long, sliding_window=64)
    assert window.attention_flops_per_token(4096) == window.attention_flops_per_token(2048)
    assert window.attention_flops_per_token(4096) < long.attention_flops_per_token(4096)
    assert window.attention_flops_per_token(32) == long.attention_flops_per_token(32)


def test_fall_back_values() -> None:
    assert (TINY.kv_heads, TINY.head_size) == (4, 16)
    grouped = replace(TINY, num_kv_heads=2, head_dim=32)
    assert (grouped.kv_heads, grouped.head_size) == (2, 32)


def test_only_active_experts_count_as_active() -> None:
    moe = MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=32, num_dense_layers=1)
    model = replace(TINY, moe=moe)
    assert model.num_moe_layers == 1
    assert model.num_parameters - model.num_active_parameters == 6 * model.expert_parameters
    assert TINY.num_parameters == TINY.num_active_parameters


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        ({"hidden_size": 66}, "model.hidden_size=66 is not a multiple of model.num_attention_heads=4"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_attention_heads=4"),
        (
            {"moe": MoeSpec(num_experts=4, top_k=1, expert_ffn_hidden_size=8, num_dense_layers=3)},
            "model.moe.num_dense_layers=3 exceeds model.num_layers=2",
        ),
    ],
)
def test_impossible_shapes_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(TINY, **changes)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"top_k": 9}, "model.moe.top_k=9 must lie between 1 and model.moe.num_experts=8"),
        ({"num_experts": 0}, "model.moe.num_experts=0 must be at least 1"),
        ({"num_groups": 3}, "model.moe.num_groups=3 does not divide model.moe.num_experts=8"),
    ],
)
def test_impossible_mixtures_are_one_sentence(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        MoeSpec(**(dict[str, Any](num_experts=8, top_k=2, expert_ffn_hidden_size=32) | keys))
    assert str(error.value) == sentence


def test_a_vocabulary_is_padded_to_a_multiple_for_each_rank() -> None:
    """Megatron-LM, make_vocab_size_divisible_by=128: GPT-2's 50,257 become 50,304, over 8 ranks 51,200."""
    gpt2 = replace(TINY, vocab_size=50257)
    assert gpt2.padded_vocab_size(128) == 50304
    assert gpt2.padded_vocab_size(128 * 8) == 51200
    assert gpt2.padded_vocab_size(0 * 8) == 50257
