"""Megatron-core 0.16 as the planner knows it: what it can do. There is no adapter yet, so it can only be planned.

Sources: Megatron-LM, megatron/core/transformer/transformer_config.py (recomputation, pipeline layout),
megatron/training/arguments.py (make_vocab_size_divisible_by, use_tp_pp_dp_mapping), docs of the distributed optimizer.
"""

from __future__ import annotations

from strategies.base import Capabilities, Execution, StateBytes
from strategies.spec import Plan


def _experts_want_sequence_parallel(plan: Plan) -> str | None:
    # Each rank of a tensor parallel group would route the same tokens otherwise (transformer/moe/moe_layer.py).
    if plan.tp > 1 and (plan.ep > 1 or plan.etp > 1) and not plan.sequence_parallel:
        return (
            f"{plan.strategy} cannot train experts with plan.tp={plan.tp} and plan.sequence_parallel=false; "
            "use plan.sequence_parallel=true, or plan.tp=1"
        )
    return None


# 16-bit weights, fp32 gradients (accumulate_allreduce_grads_in_fp32), fp32 master weights and moments. fp8 and nvfp4
# recipes keep 16-bit weights and cast them on the way.
_MIXED = StateBytes(weights=2, gradients=4, optimizer=12, fresh_gradients=2)

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
    vocabulary_multiple=128,
    rules=(_experts_want_sequence_parallel,),
    execution=Execution(
        fused_kernels=True,
        attention="flash3",
        fused_accumulation=True,
        overlap_tp=True,
        overlap_pp=True,
        quantized_inputs=True,
        bytes_per_logit=2,  # Transformer Engine's cross entropy works in place
    ),
    shards_single_rank=True,
    reshardable=True,
)
