"""ColossalAI 0.5.0 as the planner knows it: what it can do. There is no adapter yet, so it can only be planned.

Stages 0 to 2 are HybridParallelPlugin, stage 3 is GeminiPlugin. Sources: colossalai/booster/plugin/
{hybrid_parallel_plugin,gemini_plugin}.py and colossalai/shardformer/policies.
"""

from __future__ import annotations

from strategies.base import Capabilities, StateBytes
from strategies.spec import Plan


def _gemini_has_no_pipeline(plan: Plan) -> str | None:
    if plan.zero_stage == 3 and plan.pp > 1:
        return (
            f"{plan.strategy} has no pipeline with plan.zero_stage=3 (GeminiPlugin); "
            "use plan.pp=1, or plan.zero_stage in 0, 1"
        )
    return None


def _pipeline_shards_no_gradients(plan: Plan) -> str | None:
    # HybridParallelPlugin.__init__ asserts it: gradients would be reduced after every micro-batch.
    if plan.zero_stage == 2 and plan.pp > 1:
        return f"{plan.strategy} cannot combine plan.zero_stage=2 with plan.pp={plan.pp}; use plan.zero_stage in 0, 1"
    return None


def _gemini_computes_in_16_bits(plan: Plan) -> str | None:
    if plan.zero_stage == 3 and plan.precision == "fp32":
        return (
            f"{plan.strategy} has no training.precision=fp32 with plan.zero_stage=3 (GeminiPlugin); "
            "use bf16 or fp16, or plan.zero_stage in 0, 1, 2"
        )
    return None


# 16-bit weights and gradients, fp32 master weights and moments.
_MIXED = StateBytes(weights=2, gradients=2, optimizer=12)
# Its AMP optimizer of stage 0 holds the same; LowLevelZero keeps a flat fp32 master copy even in fp32.
_FULL = StateBytes(weights=4, gradients=4, optimizer=8)
_FULL_SHARDED = StateBytes(weights=4, gradients=4, optimizer=12)

CAPABILITIES = Capabilities(
    zero_stages=frozenset({0, 1, 2, 3}),
    precisions=frozenset({"fp32", "bf16", "fp16"}),
    recompute=frozenset({"none", "full"}),
    state_bytes={"fp32": _FULL, "bf16": _MIXED, "fp16": _MIXED},
    stage_state_bytes={("fp32", 1): _FULL_SHARDED, ("fp32", 2): _FULL_SHARDED},
    degrees=frozenset({"tp", "pp", "vp"}),
    # sequence_parallelism_mode="split_gather"; "ring" returns wrong gradients (shardformer/layer/_operation.py,
    # _ring_as_gather) and is never used.
    sequence_parallel=True,
    offload_optimizer_stages=frozenset({1, 2, 3}),
    offload_parameters_stages=frozenset({3}),
    # Families with a Shardformer policy. Mixtures need another plugin, whose expert parallelism is not covered here.
    model_types=frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"}),
    rank_order=("tp", "cp", "pp", "dp"),  # dp_outside=True
    other_rank_orders=(("tp", "cp", "dp", "pp"),),
    uneven_pipeline=True,  # num_layers_per_stage; indivisible layers go to the middle stages
    vocabulary_multiple=64,  # make_vocab_size_divisible_by
    buffer_elements=12 * 2**20,  # zero_bucket_size_in_m
    rules=(_gemini_has_no_pipeline, _pipeline_shards_no_gradients, _gemini_computes_in_16_bits),
    shards_single_rank=True,
)
