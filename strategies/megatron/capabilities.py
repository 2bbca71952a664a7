"""What Megatron-core 0.16 can do, for the planner. No torch.

Sources: Megatron-LM, megatron/core/transformer/transformer_config.py (recomputation, pipeline layout),
megatron/training/arguments.py (make_vocab_size_divisible_by, use_tp_pp_dp_mapping), docs of the distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan

# make_vocab_size_divisible_by: rows of the token table, times tp.
VOCABULARY_MULTIPLE = 128


def _experts_want_sequence_parallel(plan: Plan, model: ModelSpec) -> str | None:
    # Each rank of a tensor parallel group would route the same tokens otherwise (transformer/moe/moe_layer.py).
    if model.moe and plan.tp > 1 and not plan.sequence_parallel:
        return (
            f"{plan.strategy} cannot train experts with plan.tp={plan.tp} and plan.sequence_parallel=false; "
            "use plan.sequence_parallel=true, or plan.tp=1"
        )
    return None


def _sequence_parallel_wants_tensor_parallel(plan: Plan) -> str | None:
    if plan.sequence_parallel and plan.tp == 1:
        return (
            f"{plan.strategy} has no plan.sequence_parallel=true with plan.tp=1 (model_parallel_config.py); "
            "use plan.sequence_parallel=false, or plan.tp above 1"
        )
    return None


# 16-bit weights, fp32 gradients (grad_reduce_in_fp32), fp32 master weights and moments. fp8 and nvfp4
# recipes keep 16-bit weights and cast them on the way.
_MIXED = StateBytes(weights=2, gradients=4, optimizer=12, fresh_gradients=2)

# Kernels and schedules that a user may want to set; what the plan decides is refused below.
ENGINE_KEYS: Mapping[str, Any] = {
    "transformer": dict.fromkeys(
        (
            "apply_rope_fusion",
            "attention_softmax_in_fp32",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "cp_comm_type",
            "cross_entropy_fusion_impl",
            "cross_entropy_loss_fusion",
            "deallocate_pipeline_outputs",
            "distribute_saved_activations",
            "fp32_residual_connection",
            "fp8_recipe",
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "moe_grouped_gemm",
            "moe_permute_fusion",
            "moe_router_fusion",
            "moe_router_load_balancing_type",
            "moe_shared_expert_overlap",
            "moe_token_dispatcher_type",
            "moe_z_loss_coeff",
            "persist_layer_norm",
        )
    ),
    "ddp": dict.fromkeys(
        (
            "average_in_collective",
            "bucket_size",
            "check_for_nan_in_grad",
            "grad_reduce_in_fp32",
            "overlap_grad_reduce",
            "pad_buckets_for_high_nccl_busbw",
        )
    ),
    "optimizer": dict.fromkeys(("hysteresis", "initial_loss_scale", "loss_scale_window", "min_loss_scale")),
}

OWNED_ENGINE_KEYS: Mapping[str, str] = {
    "transformer.tensor_model_parallel_size": "plan.tp",
    "transformer.pipeline_model_parallel_size": "plan.pp",
    "transformer.virtual_pipeline_model_parallel_size": "plan.vp",
    "transformer.overlap_p2p_comm": "plan.vp",
    "transformer.batch_p2p_comm": "plan.vp",
    "transformer.pipeline_model_parallel_layout": "plan.pipeline_split",
    "transformer.context_parallel_size": "plan.cp",
    "transformer.expert_model_parallel_size": "plan.ep",
    "transformer.expert_tensor_parallel_size": "plan.etp",
    "transformer.sequence_parallel": "plan.sequence_parallel",
    "transformer.recompute_granularity": "plan.recompute",
    "transformer.recompute_method": "plan.recompute",
    "transformer.recompute_num_layers": "plan.recompute_num_layers",
    "transformer.recompute_modules": "plan.recompute_modules",
    "transformer.bf16": "training.precision",
    "transformer.fp16": "training.precision",
    "transformer.fp8": "training.precision",
    "transformer.deterministic_mode": "training.deterministic",
    "transformer.moe_aux_loss_coeff": "model.moe.router_aux_loss_coef",
    "ddp.use_distributed_optimizer": "plan.zero_stage",
    "ddp.overlap_param_gather": "plan.zero_stage",
    "optimizer.use_distributed_optimizer": "plan.zero_stage",
    "optimizer.lr": "training.learning_rate",
    "optimizer.weight_decay": "training.weight_decay",
    "optimizer.clip_grad": "training.max_grad_norm",
    "optimizer.adam_beta1": "training.adam_beta1",
    "optimizer.adam_beta2": "training.adam_beta2",
    "optimizer.adam_eps": "training.adam_eps",
}

CAPABILITIES = Capabilities(
    zero_stages=frozenset({0, 1}),  # 1: the distributed optimizer
    precisions=frozenset({"fp32", "bf16", "fp16", "fp8"}),
    recompute=frozenset({"none", "selective", "full"}),
    state_bytes={
        "fp32": StateBytes(weights=4, gradients=4, optimizer=8),
        "bf16": _MIXED,
        "fp16": _MIXED,
        "fp8": _MIXED,
    },
    degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
    sequence_parallel=True,
    model_types=frozenset(
        {"gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"}
    ),
    rank_order=("tp", "cp", "dp", "pp"),
    other_rank_orders=(("tp", "cp", "pp", "dp"),),  # --use-tp-pp-dp-mapping
    uneven_pipeline=True,  # pipeline_model_parallel_layout
    partial_recompute=True,  # recompute_method=block, recompute_num_layers
    recompute_modules=frozenset({"mlp", "moe", "layernorm", "moe_act", "mla_up_proj"}),
    vocabulary_multiple=VOCABULARY_MULTIPLE,
    rules=(_sequence_parallel_wants_tensor_parallel,),
    model_rules=(_experts_want_sequence_parallel,),
    execution=Execution(
        fused_kernels=True,
        attention="flash3",
        fused_accumulation=True,
        overlap_tp_backward=True,
        overlap_pp=True,
        quantized_inputs=True,
        bytes_per_logit=2,  # Transformer Engine's cross entropy works in place
    ),
    shards_single_rank=True,
    reshardable=frozenset({"dp", "tp", "pp", "vp", "cp", "ep", "etp", "rank_order"}),
    engine_keys=ENGINE_KEYS,
    owned_engine_keys=OWNED_ENGINE_KEYS,
    unpriced_engine_keys=frozenset(
        {
            "transformer.distribute_saved_activations",
            "transformer.fp32_residual_connection",
            "ddp.grad_reduce_in_fp32",
        }
    ),
)
