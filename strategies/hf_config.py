"""ModelSpec to and from Hugging Face's config.json: a pure translation, without transformers or torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.names import suggest

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}

_AUX_LOSS_COEF = 0.001  # transformers' fall-back for an absent router_aux_loss_coef


def to_hf_config(model: ModelSpec) -> dict[str, Any]:
    """Return the config.json content from which transformers' AutoConfig builds this model, for training.

    Dropout is off, because not every engine draws the same random numbers. Token ids stay unset: they
    belong to the tokenizer.
    """
    _check_family(model.model_type, key="model.model_type")
    config = _shared_keys(model) | (_gpt2_keys(model) if model.model_type == "gpt2" else _rotary_keys(model))
    understood = from_hf_config(config, name=model.name)
    # What a family cannot express would otherwise be dropped without a word.
    for field in fields(ModelSpec):
        ours, theirs = getattr(_resolved(model), field.name), getattr(_resolved(understood), field.name)
        if ours != theirs:
            raise ValueError(
                f"model.{field.name}={ours} cannot be expressed in "
                f"model.model_type={model.model_type}; use {theirs}"
            )
    return config


def from_hf_config(config: Mapping[str, Any], *, name: str) -> ModelSpec:
    """Read a config.json of transformers 4 or 5; raise ValueError for what a ModelSpec cannot hold."""
    family = str(config.get("model_type"))
    _check_family(family, key="model.hf_config: model_type")
    if family == "gpt2":
        return _read_gpt2(config, name)
    return _READERS[family](config, _read_rotary(config, name))


def _check_family(family: str, *, key: str) -> None:
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{key}={family} is not a family known here; {suggest(family, ARCHITECTURES)} "
            f"(families: {', '.join(sorted(ARCHITECTURES))})"
        )


def _resolved(model: ModelSpec) -> ModelSpec:
    """Fill in the fall-back values, so that two spellings of one model compare equal."""
    return replace(model, num_kv_heads=model.kv_heads, head_dim=None if model.mla else model.head_size)


def _shared_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": model.model_type,
        "architectures": [ARCHITECTURES[model.model_type]],
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": 0.02,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _gpt2_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _rotary_keys(model: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default"}
        | dict(model.rope_scaling)
        | {"rope_theta": model.rope_theta},
        "attention_dropout": 0.0,
    }
    if model.model_type != "deepseek_v3":
        config["head_dim"] = model.head_size
    if model.model_type in ("llama", "qwen3", "qwen3_moe", "deepseek_v3"):
        config["attention_bias"] = model.attention_bias
    if model.model_type == "llama":
        config["mlp_bias"] = model.mlp_bias
    return config | _window_keys(model) | _moe_keys(model) | _mla_keys(model)


def _window_keys(model: ModelSpec) -> dict[str, Any]:
    if model.model_type in ("mistral", "mixtral"):
        return {"sliding_window": model.sliding_window}
    if model.sliding_window is None or model.model_type not in ("qwen2", "qwen3", "qwen3_moe"):
        return {}
    return {"use_sliding_window": True, "sliding_window": model.sliding_window, "max_window_layers": 0}


def _moe_keys(model: ModelSpec) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {}
    if model.model_type == "mixtral":
        return {
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.router_aux_loss_coef,
        }
    common = {
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "norm_topk_prob": moe.normalize_top_k,
    }
    if model.model_type == "qwen3_moe":
        dense = list(range(moe.num_dense_layers))
        return common | {
            "num_experts": moe.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "router_aux_loss_coef": moe.router_aux_loss_coef,
        }
    return common | {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_ffn_hidden_size // moe.expert_ffn_hidden_size,
        "first_k_dense_replace": moe.num_dense_layers,
        "n_group": moe.num_groups,
        "topk_group": moe.num_active_groups,
        "routed_scaling_factor": moe.routed_scaling_factor,
    }


def _mla_keys(model: ModelSpec) -> dict[str, Any]:
    if model.mla is None:
        return {}
    keys = {field.name: getattr(model.mla, field.name) for field in fields(MlaSpec)}
    # The multi-token prediction module is not part of the model trained here.
    return keys | {"num_nextn_predict_layers": 0}


def _size(config: Mapping[str, Any], *keys: str) -> int:
    """Return the whole number under the first of `keys` that is set; raise ValueError when none is."""
    for key in keys:
        if config.get(key) is not None:
            size: int = _value(config, key, 0)
            return size
    raise ValueError(
        f"model.hf_config lacks the key '{keys[0]}' that model_type={config['model_type']} needs; add it"
    )


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return what `key` holds, `default` where it is absent or null; raise ValueError for another type."""
    value = config.get(key)
    if value is None:
        return default
    kind = type(default) if default is not None else int
    if isinstance(value, bool) is (kind is bool) and isinstance(
        value, (int, float) if kind is float else kind
    ):
        return value
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    raise ValueError(f"model.hf_config: {key}={value!r} is not {words[kind]}; correct it")


def _expect(config: Mapping[str, Any], key: str, accepted: tuple[Any, ...]) -> None:
    value = config.get(key, accepted[0])
    if value not in accepted:
        raise ValueError(
            f"model.hf_config: {key}={value} is not supported for model_type={config['model_type']}; "
            f"use {' or '.join(str(item) for item in accepted)}"
        )


def _read_gpt2(config: Mapping[str, Any], name: str) -> ModelSpec:
    _expect(config, "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"))
    _expect(config, "scale_attn_by_inverse_layer_idx", (False,))
    hidden_size = _size(config, "n_embd", "hidden_size")
    return ModelSpec(
        name=name,
        model_type="gpt2",
        num_layers=_size(config, "n_layer", "num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=_size(config, "n_head", "num_attention_heads"),
        ffn_hidden_size=_value(config, "n_inner", 4 * hidden_size),
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_size(config, "n_positions", "max_position_embeddings", "n_ctx"),
        gated_mlp=False,
        tied_embeddings=_value(config, "tie_word_embeddings", True),
        learned_positions=True,
        norm="layernorm",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norm_eps=_value(config, "layer_norm_epsilon", 1e-5),
    )


def _read_rotary(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read what all families with rotary embeddings share; the family's reader adds the rest."""
    _expect(config, "hidden_act", ("silu", "swish"))
    theta, scaling = _read_rope(config)
    return ModelSpec(
        name=name,
        model_type=config["model_type"],
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=_size(config, "hidden_size"),
        num_attention_heads=_size(config, "num_attention_heads"),
        num_kv_heads=_value(config, "num_key_value_heads", None),
        head_dim=_value(config, "head_dim", None),
        ffn_hidden_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_size(config, "max_position_embeddings"),
        tied_embeddings=_value(config, "tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_value(config, "rms_norm_eps", 1e-5 if config["model_type"] == "mixtral" else 1e-6),
    )


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Read base and scaling: `rope_parameters` in transformers 5, `rope_theta` and `rope_scaling` in 4."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"model.hf_config: rope_parameters={rope!r} is not a group of keys; correct it")
    rope = dict(rope)
    default = 1e6 if config["model_type"] == "mixtral" else 1e4
    theta = float(_value(rope, "rope_theta", _value(config, "rope_theta", default)))
    rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    return theta, ({} if kind == "default" else {"rope_type": kind} | rope)


def _read_window(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    """Read Qwen's window: there from layer `max_window_layers` on, in a ModelSpec in all layers or none."""
    if not _value(config, "use_sliding_window", False):
        return model
    # The mixture class knows no `max_window_layers`: all its layers slide.
    first = 0 if model.model_type == "qwen3_moe" else _value(config, "max_window_layers", 28)
    sliding_layers = model.num_layers - first
    if 0 < sliding_layers < model.num_layers:
        raise ValueError(
            f"model.hf_config: max_window_layers={first} mixes sliding and full attention, which is not "
            f"supported; use 0 or {model.num_layers}"
        )
    return replace(model, sliding_window=_size(config, "sliding_window")) if sliding_layers > 0 else model


def _read_llama(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    bias = _value(config, "attention_bias", False)
    return replace(
        model, attention_bias=bias, attention_output_bias=bias, mlp_bias=_value(config, "mlp_bias", False)
    )


def _read_mistral(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    # transformers' own fall-back for an absent key is 4096; an explicit null means full attention.
    absent = None if "sliding_window" in config else 4096
    return replace(model, sliding_window=_value(config, "sliding_window", absent))


def _read_qwen2(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    return _read_window(config, replace(model, attention_bias=True))


def _read_qwen3(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    bias = _value(config, "attention_bias", False)
    head_dim = model.head_dim or 128  # Qwen3's fall-back is not hidden_size / num_attention_heads
    model = replace(model, head_dim=head_dim, attention_bias=bias, attention_output_bias=bias)
    return _read_window(config, replace(model, qk_norm=True))


def _read_mixtral(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    moe = MoeSpec(
        num_experts=_size(config, "num_local_experts", "num_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        expert_ffn_hidden_size=model.ffn_hidden_size,
        router_aux_loss_coef=_value(config, "router_aux_loss_coef", _AUX_LOSS_COEF),
    )
    return replace(model, moe=moe, sliding_window=_value(config, "sliding_window", None))


def _read_qwen3_moe(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    _expect(config, "decoder_sparse_step", (1,))
    dense = config.get("mlp_only_layers") or []
    if list(dense) != list(range(len(dense))):
        raise ValueError(f"model.hf_config: mlp_only_layers={dense} must name the leading layers only")
    # This family's class splits the hidden size evenly when head_dim is absent, unlike the dense one.
    head_dim = model.head_size
    moe = MoeSpec(
        num_experts=_size(config, "num_experts", "num_local_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        expert_ffn_hidden_size=_size(config, "moe_intermediate_size"),
        num_dense_layers=len(dense),
        normalize_top_k=_value(config, "norm_topk_prob", False),
        router_aux_loss_coef=_value(config, "router_aux_loss_coef", _AUX_LOSS_COEF),
    )
    return replace(_read_qwen3(config, replace(model, head_dim=head_dim)), moe=moe)


def _read_deepseek_v3(config: Mapping[str, Any], model: ModelSpec) -> ModelSpec:
    _expect(config, "attention_bias", (False,))
    expert = _size(config, "moe_intermediate_size")
    moe = MoeSpec(
        num_experts=_size(config, "n_routed_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        expert_ffn_hidden_size=expert,
        shared_ffn_hidden_size=_value(config, "n_shared_experts", 1) * expert,
        num_dense_layers=_size(config, "first_k_dense_replace"),
        num_groups=_value(config, "n_group", 8),
        num_active_groups=_value(config, "topk_group", 4),
        routed_scaling_factor=_value(config, "routed_scaling_factor", 2.5),
        normalize_top_k=_value(config, "norm_topk_prob", True),
    )
    mla = MlaSpec(**{field.name: _size(config, field.name) for field in fields(MlaSpec)})
    return replace(model, moe=moe, mla=mla, head_dim=None)


_READERS: dict[str, Callable[[Mapping[str, Any], ModelSpec], ModelSpec]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "mixtral": _read_mixtral,
    "qwen3_moe": _read_qwen3_moe,
    "deepseek_v3": _read_deepseek_v3,
}
