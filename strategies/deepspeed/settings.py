"""Plan to DeepSpeed's configuration: a pure translation, with golden files in tests/golden/deepspeed."""

from __future__ import annotations

from typing import Any

from strategies.engine_options import merge
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

# DeepSpeed reserves its buckets in full; its default of 5e8 elements costs 1 GB each, whatever the model.
BUCKET_ELEMENTS = 200_000_000
# The optimizer's states come from the disk in groups of so many elements, each with four buffers of that size; its
# default of 1e9 would keep 16 GB of every rank in memory.
SWAPPED_ELEMENTS = 100_000_000


def to_deepspeed_config(plan: Plan, model: ModelSpec, training: TrainingSpec) -> dict[str, Any]:
    """Return the DeepSpeed configuration of `plan`; engine keys must have passed `engine_options.check`."""
    config = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_microbatches,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": _zero(plan, model),
        # torch's AdamW may run an offloaded step where DeepSpeed's own was not compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # Its timer would synchronise the device at every step.
        "timers": {"throughput": {"enabled": False}},
        **_precision(plan),
        **_experts(plan, model),
        **({"sequence_parallel_size": plan.cp} if plan.cp > 1 else {}),
    }
    return merge(config, plan.engine)


def _experts(plan: Plan, model: ModelSpec) -> dict[str, Any]:
    """AutoEP's section; the presets would normalize the weights of the chosen experts whatever the model says."""
    if plan.ep == 1:
        return {}
    assert model.moe is not None
    section = {
        "enabled": True,
        "autoep_size": plan.ep,
        "preset_model": model.model_type,
        "route_norm": model.moe.normalize_top_k,
    }
    return {"expert_parallel": section}


def summed_parts(plan: Plan) -> int:
    """Return of how many ranks' sequences DeepSpeed sums gradients where it should average them.

    It divides by the data parallel ranks alone; only ZeRO-3 divides by all, as it scatters (runtime/zero/stage3.py,
    __avg_scatter_grads).
    """
    return 1 if plan.zero_stage == 3 else plan.cp


def partition_words() -> dict[str, Any]:
    """Return what AutoTP cuts by columns and by rows, and whose gradients tensor parallel ranks add up.

    These are transformers' own plans for the dense families (`base_model_tp_plan`); norms over the heads are whole on
    every rank, and each sees the gradient of its heads only.
    """

    def of(names: str, kind: str, **more: Any) -> dict[str, Any]:
        return {"patterns": [rf".*\.({names})\.weight$"], "partition_type": kind, **more}

    return {
        "use_default_specs": False,
        "layer_specs": [
            of("q_proj|k_proj|v_proj|gate_proj|up_proj", "column"),
            of("o_proj|down_proj", "row"),
            of("q_norm|k_norm", "skip", grad_allreduce=True),
        ],
    }


def _zero(plan: Plan, model: ModelSpec) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage == 0:
        return section
    bucket = min(BUCKET_ELEMENTS, model.num_parameters // (plan.tp * plan.pp))
    section["reduce_bucket_size"] = bucket
    if plan.zero_stage == 3:
        # By default up to 1e9 gathered elements stay alive, which is most of a small model.
        section["stage3_max_live_parameters"] = bucket
        section["stage3_max_reuse_distance"] = bucket
    else:
        section["allgather_bucket_size"] = bucket
    place: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    if plan.nvme_path:
        place |= {"device": "nvme", "nvme_path": plan.nvme_path}
    if plan.offload_optimizer:
        section["offload_optimizer"] = dict(place)
        if plan.nvme_path:
            section["sub_group_size"] = SWAPPED_ELEMENTS
    if plan.offload_parameters:
        section["offload_param"] = dict(place)
        if plan.nvme_path:
            # By default the first 1e9 elements stay in memory, and each of five buffers has 1e8.
            section["offload_param"] |= {"max_in_cpu": 0, "buffer_size": largest_shard(plan, model)}
    return section


def why_not_zero_plus_plus(plan: Plan, *, device: str, local_ranks: int) -> str | None:
    """Return one sentence why ZeRO++'s keys cannot be had on these ranks, or None."""
    given, prefix = plan.engine.get("zero_optimization", {}), "strategy.engine.zero_optimization"
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if given.get(key) and device == "cpu":
            # ops/op_builder/cpu/no_impl.py raises it once the first layer is gathered.
            return (
                f"{prefix}.{key}=true needs a GPU: DeepSpeed quantizes with kernels of CUDA; remove the key"
            )
    size = given.get("zero_hpz_partition_size", 1)
    if plan.dp * plan.cp % size or local_ranks % size:
        return (
            f"{prefix}.zero_hpz_partition_size={size} must divide plan.dp * plan.cp={plan.dp * plan.cp} and the "
            f"{local_ranks} ranks of a host, which keep a copy of the weights among them"
        )
    return None


def swapped_bytes(plan: Plan, model: ModelSpec) -> float:
    """Return what a rank keeps on its disk: master weights, gradients and two moments, and 16-bit or fp32 weights."""
    weights = 4 if plan.precision == "fp32" else 2
    per_parameter = 16 * plan.offload_optimizer + weights * plan.offload_parameters
    return model.num_parameters / plan.world_size * per_parameter


def largest_shard(plan: Plan, model: ModelSpec) -> int:
    """Return the elements that a rank has of the largest parameter under ZeRO-3; transformers stacks experts."""
    widths = [
        model.vocab_size,
        model.max_position_embeddings,
        2 * model.ffn_hidden_size,
        3 * model.num_attention_heads * model.head_size,
    ]
    if model.moe:
        widths.append(2 * model.moe.num_experts * model.moe.expert_ffn_hidden_size)
    return -(-model.hidden_size * max(widths) // (plan.dp * plan.cp))


def _precision(plan: Plan) -> dict[str, Any]:
    if plan.precision == "fp32":
        return {}
    if plan.zero_stage == 0:
        # DeepSpeed's own bf16 has no fp32 gradient accumulation without ZeRO; autocast keeps everything in fp32.
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    # Only stage 1 knows `immediate_grad_update`: without it a bf16 copy of all gradients lives beside the fp32 one.
    bf16 = {"enabled": True, "immediate_grad_update": True} if plan.zero_stage == 1 else {"enabled": True}
    return {"bf16": bf16, "data_types": {"grad_accum_dtype": "fp32"}}
