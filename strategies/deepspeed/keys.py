"""The configuration keys of DeepSpeed 0.19.8: which pass through, which the plan decides, which do nothing here.

DeepSpeed reads its top level with `dict.get` and ignores what it does not know, so the list has to be ours.
Source: deepspeed/runtime/{config,constants}.py and the pydantic models and constants of each section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _values(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


_OFFLOAD_OPTIMIZER = _values(
    "buffer_count",
    "pin_memory",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
    "ratio",
    "super_offload",
    "cpuadam_cores_perc",
)
_OFFLOAD_PARAM = _values("buffer_count", "buffer_size", "max_in_cpu", "pin_memory")

_ZERO = _values(
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "load_from_fp32_weights",
    "zenflow",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
)

ACCEPTED: Mapping[str, Any] = {
    **_values(
        "communication_data_type",
        "disable_python_gc",
        "dump_state",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
    ),
    "zero_optimization": {
        **_ZERO,
        "offload_optimizer": _OFFLOAD_OPTIMIZER,
        "offload_param": _OFFLOAD_PARAM,
        "leaf_module": _values("classes", "names", "name_suffixes"),
    },
    "bf16": _values("check_grad_overflow", "immediate_grad_update"),
    "aio": _values(
        "block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"
    ),
    "comms_logger": _values("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "flops_profiler": _values(
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
    "timers": {"throughput": _values("enabled", "synchronized")},
}

# Dotted key -> the key of ours that decides it.
OWNED: Mapping[str, str] = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "plan.micro_batch_size",
    "gradient_accumulation_steps": "plan.num_microbatches",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "zero_allow_untested_optimizer": "training.optimizer",
    "zero_force_ds_cpu_optimizer": "plan.offload_optimizer",
    "zero_optimization.stage": "plan.zero_stage",
    "zero_optimization.offload_optimizer.device": "plan.offload_optimizer",
    "zero_optimization.offload_param.device": "plan.offload_parameters",
    "zero_optimization.offload_optimizer.nvme_path": "plan.nvme_path",
    "zero_optimization.offload_param.nvme_path": "plan.nvme_path",
    "zero_optimization.cpu_offload": "plan.offload_optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "plan.offload_optimizer",
    "zero_optimization.cpu_offload_param": "plan.offload_parameters",
    # The norm is part of every step's result.
    "zero_optimization.compute_grad_norm": "training.max_grad_norm",
    "bf16.enabled": "training.precision",
    "bf16.bf16_master_weights_and_grads": "training.precision",
    "bf16.bf16_optimizer_states": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "activation_checkpointing": "plan.recompute",
    "tensor_parallel": "plan.tp",
    "pipeline": "plan.pp",
    "expert_parallel": "plan.ep",
    "use_data_before_expert_parallelism": "plan.rank_order",
    "sequence_parallel_size": "plan.cp",
    "seq_parallel_communication_data_type": "plan.cp",
    "data_efficiency": "data",
    "dataloader_drop_last": "data",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
    "tensorboard": "monitor",
    "wandb": "monitor",
    "csv_monitor": "monitor",
    "comet": "monitor",
}

# Known and refused: what goes wrong. Values of HARMLESS turn a key off.
HARMFUL: Mapping[str, str] = {
    # runtime/zero/stage_1_and_2.py: the flat buffer is in another order than the mapping to parameters says.
    "round_robin_gradients": "checkpoints and exports would find other tensors' values in its partitions",
    # runtime/zenflow/engine_stage3.py and zenflow_stage_1_and_2.py call step(step_id=...).
    "zenflow": "it calls the optimizer with an argument that no AdamW takes",
    # runtime/superoffload/superoffload_utils.py: another process has the moments.
    "super_offload": "it keeps Adam's moments where no checkpoint finds them",
    # runtime/zero/stage3.py, backup_optimizer: its learning rate is that of the start.
    "ratio": "what stays on the device would not follow the schedule of the learning rate",
}
HARMLESS: Mapping[str, tuple[object, ...]] = {"ratio": (None, 1, 1.0)}

# They change memory, and the planner's estimate does not follow. `reduce_bucket_size` is not among them.
UNPRICED = frozenset(
    {
        "bf16.immediate_grad_update",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.memory_efficient_linear",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_scatter",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_model_persistence_threshold",
        "zero_optimization.stage3_module_granularity_threshold",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size",
        "zero_optimization.zero_hpz_partition_size",
        "zero_optimization.zero_quantized_gradients",
        "zero_optimization.zero_quantized_weights",
    }
)

# Known to DeepSpeed, but read only by parts that are never called here, or only by old releases.
UNUSED = frozenset(
    {
        "autotuning",
        "compile",
        "disable_allgather",
        "hybrid_engine",
        "managed_gradient_accumulation",
        "vocabulary_size",
        "weight_quantization",
        "zero_optimization.elastic_checkpoint",
        "zero_optimization.legacy_stage1",
        "zero_optimization.override_module_apply",
        "zero_optimization.pipeline_loading_checkpoint",
        "zero_optimization.save_muon_momentum_buffer_in_memory",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    }
)
