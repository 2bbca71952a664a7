"""ColossalAI 0.5.0 as the planner knows it: what it can do. Files below are named as they lie in `colossalai/`."""

from __future__ import annotations

from strategies.base import Capabilities, StateBytes
from strategies.colossalai.settings import ENGINE_KEYS, OWNED_ENGINE_KEYS, VOCABULARY_MULTIPLE
from strategies.spec import Plan


def _stage_3_has_no_pipeline(plan: Plan) -> str | None:
    if plan.zero_stage == 3 and plan.pp > 1:
        return (
            f"{plan.strategy} has no pipeline with plan.zero_stage=3 (GeminiPlugin, TorchFSDPPlugin); "
            "use plan.pp=1, or plan.zero_stage in 0, 1"
        )
    return None


def _stage_3_splits_no_matrices(plan: Plan) -> str | None:
    # zero/gemini/gemini_optimizer.py, _calc_global_norm: summed over the ranks of ZeRO only, so that tensor parallel
    # ranks clip by different norms and their copies of the same weights drift apart. TorchFSDPPlugin has no other axis.
    if plan.zero_stage == 3 and plan.tp > 1:
        why = "has no tensor parallelism" if plan.precision == "fp32" else "clips wrongly"
        plugin = "TorchFSDPPlugin" if plan.precision == "fp32" else "GeminiPlugin"
        return (
            f"{plan.strategy} {why} with plan.zero_stage=3 ({plugin}) and plan.tp={plan.tp}; "
            "use plan.tp=1, or plan.zero_stage in 0, 1, 2"
        )
    return None


def _fsdp_offloads_nothing(plan: Plan) -> str | None:
    # Torch's offloading counts gradients of one micro-batch only, and Gemini, which offloads, has 16 bits.
    if (
        plan.zero_stage == 3
        and plan.precision == "fp32"
        and (plan.offload_optimizer or plan.offload_parameters)
    ):
        return (
            f"{plan.strategy} offloads nothing in training.precision=fp32 with plan.zero_stage=3 (TorchFSDPPlugin); "
            "use bf16, or plan.zero_stage in 1, 2 with plan.offload_optimizer=true"
        )
    return None


def _gemini_offloads_optimizer_first(plan: Plan) -> str | None:
    # zero/gemini/placement_policy.py reads the parameters' fraction only where the optimizer's is 1.
    if plan.offload_parameters and not plan.offload_optimizer:
        return (
            f"{plan.strategy} offloads parameters only together with the optimizer's state; "
            "use plan.offload_optimizer=true, or plan.offload_parameters=false"
        )
    return None


def _pipeline_shards_no_gradients(plan: Plan) -> str | None:
    # HybridParallelPlugin.__init__ asserts it: gradients would be reduced after every micro-batch.
    if plan.zero_stage == 2 and plan.pp > 1:
        return f"{plan.strategy} cannot combine plan.zero_stage=2 with plan.pp={plan.pp}; use plan.zero_stage in 0, 1"
    return None


def _zero_beside_other_axes_computes_in_16_bits(plan: Plan) -> str | None:
    # HybridParallelPlugin.configure asserts it; LowLevelZeroPlugin, which knows data parallelism alone, does not.
    if plan.zero_stage in (1, 2) and plan.precision == "fp32" and (plan.tp > 1 or plan.pp > 1):
        return (
            f"{plan.strategy} has no training.precision=fp32 with plan.zero_stage={plan.zero_stage} beside tensor or "
            "pipeline parallelism; use bf16, or plan.zero_stage=0"
        )
    return None


def _sharded_gradients_sum_sequences_twice(plan: Plan) -> str | None:
    # hybrid_parallel_plugin.py, HybridParallelZeroOptimizer.backward: sums the norms' gradients over tensor parallel
    # ranks after every micro-batch, what earlier micro-batches left there included.
    if plan.zero_stage == 2 and plan.sequence_parallel:
        return (
            f"{plan.strategy} accumulates wrong gradients with plan.zero_stage=2 and plan.sequence_parallel=true; "
            "use plan.zero_stage in 0, 1, or plan.sequence_parallel=false"
        )
    return None


def _chunks_are_equal(plan: Plan) -> str | None:
    # pipeline/stage_manager.py asserts one count a stage, and places one count a chunk.
    if plan.pipeline_split and plan.vp > 1:
        return f"{plan.strategy} has equal chunks only with plan.vp={plan.vp}; use plan.pipeline_split=null"
    return None


# 16-bit weights and gradients, fp32 master weights and moments; the step casts gradients to fp32.
_MIXED = StateBytes(weights=2, gradients=2, optimizer=12, step=4)
# Adam reads 16-bit gradients; chunks are gathered whole.
_GEMINI = StateBytes(weights=2, gradients=2, optimizer=12, gathered=2)
_FULL = StateBytes(weights=4, gradients=4, optimizer=8)
# Layers are gathered one at a time.
_FSDP = StateBytes(weights=4, gradients=4, optimizer=8, gathered=4)
# LowLevelZero keeps a flat master copy even in fp32.
_FULL_SHARDED = StateBytes(weights=4, gradients=4, optimizer=12)

CAPABILITIES = Capabilities(
    zero_stages=frozenset({0, 1, 2, 3}),
    # fp16: amp/naive_amp/mixed_precision_mixin/fp16.py lets the loss scale grow before it divides by it, so that
    # every thousandth step moves by half its gradient.
    precisions=frozenset({"fp32", "bf16"}),
    recompute=frozenset({"none", "full"}),
    state_bytes={"fp32": _FULL, "bf16": _MIXED},
    stage_state_bytes={
        ("fp32", 1): _FULL_SHARDED,
        ("fp32", 2): _FULL_SHARDED,
        ("fp32", 3): _FSDP,
        ("bf16", 3): _GEMINI,
    },
    degrees=frozenset({"tp", "pp", "vp"}),
    # sequence_parallelism_mode="split_gather"; "ring" returns wrong gradients (shardformer/layer/_operation.py,
    # _ring_as_gather) and is never used. Nor is the zero-bubble schedule, which loses gradients where Apex is
    # missing (pipeline/weight_grad_store.py, pop).
    sequence_parallel=True,
    offload_optimizer_stages=frozenset({1, 2, 3}),
    offload_parameters_stages=frozenset({3}),
    # Families with a Shardformer policy that trains right: GPT-2's divides the norm of its sharded matrices by tp, and
    # is further off with split sequences. Mixtures need another plugin, whose expert parallelism is not covered here.
    model_types=frozenset({"llama", "mistral", "qwen2"}),
    rank_order=("tp", "cp", "pp", "dp"),  # dp_outside=True
    other_rank_orders=(("tp", "cp", "dp", "pp"),),
    uneven_pipeline=True,  # num_layers_per_stage; indivisible layers go to the middle stages
    vocabulary_multiple=VOCABULARY_MULTIPLE,
    buffer_elements=12 * 2**20,  # zero_bucket_size_in_m
    rules=(
        _stage_3_has_no_pipeline,
        _stage_3_splits_no_matrices,
        _fsdp_offloads_nothing,
        _gemini_offloads_optimizer_first,
        _pipeline_shards_no_gradients,
        _zero_beside_other_axes_computes_in_16_bits,
        _sharded_gradients_sum_sequences_twice,
        _chunks_are_equal,
    ),
    fills_pipeline=True,
    shards_single_rank=True,
    engine_keys=ENGINE_KEYS,
    owned_engine_keys=OWNED_ENGINE_KEYS,
    unpriced_engine_keys=frozenset(
        {
            "hybrid_parallel.ddp_bucket_cap_mb",
            "hybrid_parallel.zero_bucket_size_in_m",
            "low_level_zero.reduce_bucket_size_in_m",
            "gemini",
        }
    ),
)
