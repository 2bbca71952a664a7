"""Plan, model and training -> what Megatron-core is told: a pure translation, without torch.

Every value is plain data (network.py turns names of types and activations into objects), so that golden files hold it.
Words of Megatron-core 0.16: megatron/core/{parallel_state,model_parallel_config}.py, transformer/transformer_config.py,
models/gpt/gpt_model.py, distributed/distributed_data_parallel_config.py, optimizer/optimizer_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.engine_options import merge
from strategies.megatron.capabilities import VOCABULARY_MULTIPLE
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

# What Megatron-core's own llama3 scaling has fixed (models/common/embeddings/rotary_pos_embedding.py).
_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
_ORDER = {"dp": "ep-dp"}  # Megatron-core takes expert parallel ranks out of the data parallel ones


@dataclass(frozen=True, kw_only=True)
class Extensions:
    """Which optional packages are here: they decide kernels, never results."""

    transformer_engine: bool = False
    fused_accumulation: bool = False  # Apex' fused_weight_gradient_mlp_cuda


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keyword arguments of Megatron-core's own constructors."""

    parallel: Mapping[str, Any]  # initialize_model_parallel
    transformer: Mapping[str, Any]  # TransformerConfig, or MLATransformerConfig
    model: Mapping[str, Any]  # GPTModel
    ddp: Mapping[str, Any]  # DistributedDataParallelConfig
    optimizer: Mapping[str, Any]  # OptimizerConfig


def to_settings(
    plan: Plan, model: ModelSpec, training: TrainingSpec, *, extensions: Extensions | None = None
) -> Settings:
    """Translate; raise ValueError for what Megatron-core cannot express."""
    extensions = extensions or Extensions()
    _check_expressible(model, plan)
    given = plan.engine
    return Settings(
        parallel=_parallel(plan),
        transformer=merge(_transformer(plan, model, training, extensions), given.get("transformer", {})),
        model=_gpt(plan, model),
        ddp=merge(_ddp(plan), given.get("ddp", {})),
        optimizer=merge(_optimizer(plan, training), given.get("optimizer", {})),
    )


def _check_expressible(model: ModelSpec, plan: Plan) -> None:
    if model.mlp_bias != model.attention_output_bias:
        raise ValueError(
            f"model.mlp_bias={model.mlp_bias} with model.attention_output_bias={model.attention_output_bias} is not "
            "possible in Megatron-core, which has one switch for both (add_bias_linear); use another strategy"
        )
    scaling = dict(model.rope_scaling)
    kind = scaling.pop("rope_type", "default")
    fixed = {key: value for key, value in scaling.items() if key != "factor"}
    if kind not in ("default", "yarn" if model.mla else "llama3") or (
        kind == "llama3" and fixed != _LLAMA3_ROPE
    ):
        raise ValueError(
            f"model.rope_scaling={dict(model.rope_scaling)} is not one that Megatron-core computes for "
            f"model.model_type={model.model_type}; use strategy=accelerate"
        )
    if model.moe and model.model_type == "deepseek_v3":
        _check_deepseek(model, model.moe)
    if plan.recompute_num_layers % plan.vp:
        raise ValueError(
            f"plan.recompute_num_layers={plan.recompute_num_layers} is not a multiple of plan.vp={plan.vp}, and "
            "Megatron-core recomputes equally many layers of each chunk; use a multiple"
        )


def _check_deepseek(model: ModelSpec, moe: MoeSpec) -> None:
    """Refuse shapes for which Megatron-core would compute something else than the model's own code, silently."""
    # A group counts for its best top_k / num_active_groups experts there, for its best two here.
    per_group = moe.top_k // moe.num_active_groups
    fixed = {
        f"model.moe.top_k={moe.top_k}": moe.num_groups == 1 or per_group == 2,
        "model.moe.normalize_top_k=false": moe.normalize_top_k or moe.top_k == 1,
        f"model.norm_eps={model.norm_eps}": model.norm_eps == 1e-6,
    }
    for words, possible in fixed.items():
        if not possible:
            raise ValueError(
                f"{words} is not possible in Megatron-core for model.model_type=deepseek_v3 as DeepSeek computes it; "
                "use top_k = 2 * num_active_groups, normalize_top_k=true and norm_eps=1e-6"
            )


def _parallel(plan: Plan) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": plan.pp,
        "virtual_pipeline_model_parallel_size": plan.vp if plan.vp > 1 else None,
        "context_parallel_size": plan.cp,
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": plan.etp,
        "order": "-".join(_ORDER.get(axis, axis) for axis in plan.rank_order),
    }


def _transformer(
    plan: Plan, model: ModelSpec, training: TrainingSpec, extensions: Extensions
) -> dict[str, Any]:
    dtype = _DTYPES[plan.precision]
    return {
        **_shape(model, training),
        **{key: value for key, value in _parallel(plan).items() if key != "order"},
        "sequence_parallel": plan.sequence_parallel,
        "pipeline_model_parallel_layout": _layout(plan, model),
        # Batched sends between the same two ranks change places in an interleaved schedule: wrong and silent.
        "overlap_p2p_comm": plan.vp > 1,
        "batch_p2p_comm": plan.vp == 1,
        "variable_seq_lengths": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "fp8": "hybrid" if plan.precision == "fp8" else None,
        "deterministic_mode": training.deterministic,
        # Weights always come from a folder; what a constructor would draw is never read.
        "init_method": "none",
        "output_layer_init_method": "none",
        **_recompute(plan),
        **(_experts(plan, model, model.moe, extensions) if model.moe else {}),
        **(_latent_attention(model, model.mla) if model.mla else {}),
        **_kernels(plan, extensions),
    }


def _shape(model: ModelSpec, training: TrainingSpec) -> dict[str, Any]:
    window = model.sliding_window
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_size,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": model.gated_mlp,
        "activation_func": "silu" if model.gated_mlp else "gelu_tanh",
        "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.attention_bias,
        "qk_layernorm": model.qk_norm,
        # So many tokens to the left, beside the token itself.
        "window_size": [window - 1, 0] if window and window < training.sequence_length else None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout(plan: Plan, model: ModelSpec) -> list[list[str]] | None:
    """Name the layers of every chunk where they are not equally many."""
    layers = plan.layers_by_chunk(model.num_layers)
    if len(set(layers)) == 1:
        return None
    chunks = [["decoder"] * count for count in layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _recompute(plan: Plan) -> dict[str, Any]:
    if plan.recompute == "none":
        return {}
    if plan.recompute == "selective":
        modules = list(plan.recompute_modules) or ["core_attn"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    # Uniform with one layer a unit keeps each layer's input; block leaves the later layers of each chunk alone.
    some = plan.recompute_num_layers // plan.vp
    return {
        "recompute_granularity": "full",
        "recompute_method": "block" if some else "uniform",
        "recompute_num_layers": some or 1,
    }


def _experts(plan: Plan, model: ModelSpec, moe: MoeSpec, extensions: Extensions) -> dict[str, Any]:
    groups = moe.num_groups > 1
    # Megatron-core adds one loss a layer, each divided by top_k; Hugging Face means over all layers at once and does
    # not divide. So scaled, both press equally hard on a balanced router, and with one layer they are the same.
    per_layer = moe.router_aux_loss_coef * moe.top_k / model.num_moe_layers
    deepseek = model.model_type == "deepseek_v3"
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.expert_ffn_hidden_size,
        "moe_layer_freq": [int(layer >= moe.num_dense_layers) for layer in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": "sigmoid" if deepseek else "softmax",
        "moe_router_enable_expert_bias": deepseek,
        "moe_router_bias_update_rate": 0.0,  # the bias stays what the weights say, as with the other engines
        "moe_router_pre_softmax": not (moe.normalize_top_k or deepseek),
        "moe_router_num_groups": moe.num_groups if groups else None,
        "moe_router_group_topk": moe.num_active_groups if groups else None,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor if deepseek else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if per_layer else "none",
        "moe_aux_loss_coeff": per_layer,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": extensions.transformer_engine,
    }


def _latent_attention(model: ModelSpec, mla: MlaSpec) -> dict[str, Any]:
    scaling = dict(model.rope_scaling)
    yarn = scaling.get("rope_type") == "yarn"
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "qk_layernorm": True,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": model.rope_theta,
        **({_YARN[key]: value for key, value in scaling.items() if key in _YARN} if yarn else {}),
    }


_YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def _kernels(plan: Plan, extensions: Extensions) -> dict[str, Any]:
    """Fused kernels come with Transformer Engine and Apex; without them upstream's plain ones compute the same."""
    engine = extensions.transformer_engine
    return {
        "transformer_impl": "transformer_engine" if engine else "local",
        "cp_comm_type": "p2p" if engine and plan.cp > 1 else None,
        "cross_entropy_loss_fusion": engine,
        "cross_entropy_fusion_impl": "te" if engine else "native",
        "gradient_accumulation_fusion": extensions.fused_accumulation,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": engine,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "cuda_graph_scope": [],  # upstream warns of its own default
    }


def _gpt(plan: Plan, model: ModelSpec) -> dict[str, Any]:
    llama3 = model.rope_scaling.get("rope_type") == "llama3"
    return {
        "vocab_size": model.padded_vocab_size(VOCABULARY_MULTIPLE * plan.tp),
        "max_sequence_length": model.max_position_embeddings,
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "position_embedding_type": "learned_absolute" if model.learned_positions else "rope",
        "rotary_base": model.rope_theta,
        "rope_scaling": llama3,
        "rope_scaling_factor": float(model.rope_scaling["factor"]) if llama3 else 8.0,
    }


def _ddp(plan: Plan) -> dict[str, Any]:
    sharded = plan.zero_stage == 1
    return {
        "use_distributed_optimizer": sharded,
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": sharded,
    }


def _optimizer(plan: Plan, training: TrainingSpec) -> dict[str, Any]:
    dtype = _DTYPES[plan.precision]
    return {
        "optimizer": "adam",
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_eps": training.adam_eps,
        # 0 would leave the norm out; one that is never reached reports it.
        "clip_grad": training.max_grad_norm or float("inf"),
        "params_dtype": dtype,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "initial_loss_scale": 2.0**16,
        "use_distributed_optimizer": plan.zero_stage == 1,
        "overlap_param_gather": plan.zero_stage == 1,
    }
