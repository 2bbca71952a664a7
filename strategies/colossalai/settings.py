"""Plan to the plugin of ColossalAI's Booster and its arguments: pure, with golden files in tests/golden/colossalai."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from strategies.engine_options import merge
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

PluginName = Literal["HybridParallelPlugin", "LowLevelZeroPlugin", "GeminiPlugin", "TorchFSDPPlugin"]
Device = Literal["cuda", "cpu"]

# What of each plugin's arguments `strategy.engine` may set: the group, then the argument.
ENGINE_KEYS: Mapping[str, Mapping[str, None]] = {
    "hybrid_parallel": dict.fromkeys(
        (
            "broadcast_buffers",
            "ddp_bucket_cap_mb",
            "enable_fused_normalization",
            "enable_jit_fused",
            "enable_metadata_cache",
            "overlap_allgather",
            "overlap_communication",
            "overlap_p2p",
            "static_graph",
            "zero_bucket_size_in_m",
        )
    ),
    "low_level_zero": dict.fromkeys(
        ("overlap_allgather", "overlap_communication", "reduce_bucket_size_in_m")
    ),
    "gemini": dict.fromkeys(
        (
            "enable_async_reduce",
            "enable_fused_normalization",
            "enable_jit_fused",
            "gpu_margin_mem_ratio",
            "max_prefetch",
            "pin_memory",
            "placement_policy",
            "steady_cuda_cap_ratio",
            "warmup_non_model_data_ratio",
        )
    ),
}
_EVERY_PLUGIN = {"precision": "training.precision", "max_norm": "training.max_grad_norm"}
OWNED_ENGINE_KEYS: Mapping[str, str] = {
    **{f"{group}.{name}": ours for group in ENGINE_KEYS for name, ours in _EVERY_PLUGIN.items()},
    "hybrid_parallel.tp_size": "plan.tp",
    "hybrid_parallel.pp_size": "plan.pp",
    "hybrid_parallel.pp_style": "plan.vp",
    "hybrid_parallel.num_model_chunks": "plan.vp",
    "hybrid_parallel.num_layers_per_stage": "plan.pipeline_split",
    "hybrid_parallel.num_microbatches": "plan.num_microbatches",
    "hybrid_parallel.microbatch_size": "plan.micro_batch_size",
    "hybrid_parallel.zero_stage": "plan.zero_stage",
    "hybrid_parallel.cpu_offload": "plan.offload_optimizer",
    "hybrid_parallel.dp_outside": "plan.rank_order",
    "hybrid_parallel.enable_sequence_parallelism": "plan.sequence_parallel",
    "hybrid_parallel.enable_flash_attention": "plan.sequence_parallel",
    "low_level_zero.stage": "plan.zero_stage",
    "low_level_zero.cpu_offload": "plan.offload_optimizer",
    "gemini.tp_size": "plan.tp",
    "gemini.shard_param_frac": "plan.zero_stage",
    "gemini.offload_optim_frac": "plan.offload_optimizer",
    "gemini.offload_param_frac": "plan.offload_parameters",
    "gemini.enable_gradient_accumulation": "plan.num_microbatches",
}

# Vocabularies are padded to a multiple of this times tp: GPUs multiply such sizes faster.
VOCABULARY_MULTIPLE = 64
_CHUNK_MI = 32.0  # elements of one of Gemini's chunks, in units of 2**20: upstream's default


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """A plugin class of `colossalai.booster.plugin` by name, and what to create it with."""

    plugin: PluginName
    arguments: Mapping[str, Any]


def plugin_of(plan: Plan) -> PluginName:
    """Name the plugin that runs `plan`."""
    if plan.zero_stage == 3:
        # GeminiPlugin.__init__ takes 16 bits only.
        return "TorchFSDPPlugin" if plan.precision == "fp32" else "GeminiPlugin"
    # HybridParallelPlugin.configure refuses ZeRO in fp32, and without tp and pp it adds nothing.
    if plan.zero_stage > 0 and plan.tp == plan.pp == 1:
        return "LowLevelZeroPlugin"
    return "HybridParallelPlugin"


def to_plugin_settings(
    plan: Plan, model: ModelSpec, training: TrainingSpec, *, device: Device
) -> PluginSettings:
    """Translate `plan`; engine keys must have passed `engine_options.check`."""
    translate = {
        "HybridParallelPlugin": ("hybrid_parallel", _hybrid_parallel),
        "LowLevelZeroPlugin": ("low_level_zero", _low_level_zero),
        "GeminiPlugin": ("gemini", _gemini),
    }
    plugin = plugin_of(plan)
    # Without a limit there would be no norm to report either: nothing exceeds infinity.
    max_norm = training.max_grad_norm or math.inf
    if plugin == "TorchFSDPPlugin":
        return PluginSettings(plugin=plugin, arguments={"max_norm": max_norm})
    group, arguments_of = translate[plugin]
    shared = {"precision": plan.precision, "max_norm": max_norm}
    arguments = shared | arguments_of(plan, model, training, device)
    return PluginSettings(plugin=plugin, arguments=merge(arguments, plan.engine.get(group, {})))


def vocabulary_multiple(plan: Plan, model: ModelSpec) -> int:
    """Return what the vocabulary is padded to a multiple of, times tp.

    The padding is cut off the logits, so a tensor parallel rank that held padding alone would have none.
    """
    per_rank = -(-model.vocab_size // (VOCABULARY_MULTIPLE * plan.tp)) * VOCABULARY_MULTIPLE
    return VOCABULARY_MULTIPLE if per_rank * (plan.tp - 1) < model.vocab_size else 1


def _hybrid_parallel(plan: Plan, model: ModelSpec, training: TrainingSpec, device: Device) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "tp_size": plan.tp,
        "pp_size": plan.pp,
        "zero_stage": plan.zero_stage,
        "dp_outside": plan.rank_order.index("dp") > plan.rank_order.index("pp"),
        "make_vocab_size_divisible_by": vocabulary_multiple(plan, model),
        # Rotary tables are computed, and the same everywhere.
        "broadcast_buffers": False,
        # Otherwise DDP's buckets hold every gradient a second time.
        "gradient_as_bucket_view": True,
        # DDP re-orders its buckets after the first step, and a resumed run would sum in another order for one step;
        # looking for unused parameters turns that off.
        "find_unused_parameters": training.deterministic,
        "cpu_offload": plan.offload_optimizer,
        "overlap_communication": device == "cuda",
    }
    if plan.sequence_parallel:
        arguments |= {
            "enable_sequence_parallelism": True,
            "sequence_parallelism_mode": "split_gather",
            # Shardformer's other attention adds the mask that it is given, and under SDPA transformers gives none:
            # without this, tokens would see what follows them.
            "enable_flash_attention": True,
        }
    return arguments | (_pipeline(plan, device) if plan.pp > 1 else {})


def _pipeline(plan: Plan, device: Device) -> dict[str, Any]:
    interleaved = {"pp_style": "interleaved", "num_model_chunks": plan.vp} if plan.vp > 1 else {}
    return {
        "pp_style": "1f1b",
        **interleaved,
        "num_microbatches": plan.num_microbatches,
        "microbatch_size": plan.micro_batch_size,
        "num_layers_per_stage": list(plan.pipeline_split) or None,
        # interleaved_pp.py drops handles of overlapped messages unwaited; NCCL bears that, gloo cancels the message.
        "overlap_p2p": device == "cuda",
    }


def _low_level_zero(plan: Plan, model: ModelSpec, training: TrainingSpec, device: Device) -> dict[str, Any]:
    return {
        "stage": plan.zero_stage,
        "cpu_offload": plan.offload_optimizer,
        "overlap_communication": device == "cuda",
    }


def _gemini(plan: Plan, model: ModelSpec, training: TrainingSpec, device: Device) -> dict[str, Any]:
    mi_parameters = model.num_parameters / 2**20
    return {
        "placement_policy": "static",
        "offload_optim_frac": float(plan.offload_optimizer),
        "offload_param_frac": float(plan.offload_parameters),
        "enable_gradient_accumulation": plan.num_microbatches > 1,
        # The search for a chunk size goes in steps of hidden_dim. A model that fits into the least size would stay
        # whole on every rank; zero/gemini/chunk/manager.py (rearrange_accumulated_grad_chunk) then counts dp times
        # what earlier micro-batches left.
        "hidden_dim": model.hidden_size,
        "min_chunk_size_m": min(_CHUNK_MI, mi_parameters / 2),
        "search_range_m": min(_CHUNK_MI, mi_parameters),
        # chunk.py frees what it still sends and trusts a stream's order; gloo sends from a thread of its own.
        "enable_async_reduce": device == "cuda",
        "pin_memory": device == "cuda",
    }
