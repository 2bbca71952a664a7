"""Published rows as planning problems: a JSON object a row in, a Case or one sentence why not out.

The rows follow the shared format: model shape, GPU, layout, batch, precision, recomputation, and what was measured.
Whatever a row does not print is taken as the framework's default of its time; such guesses stand here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from launcher.cluster.spec import ClusterSpec
from launcher.compose import jobs
from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, Precision, Recompute, TrainingSpec

PRESETS = {
    "A100-SXM4-40GB": "a100_40gb",
    "A100-SXM4-80GB": "a100_80gb",
    "H100-SXM5-80GB": "h100_sxm",
    "H100-96GB-HBM2e-500W": "h100_96gb",
    "H200-SXM": "h200_sxm",
    "B200-SXM": "b200",
    "B200-class (SM100, not named)": "b200",
    "B300-SXM": "b300",
    "GB200": "gb200_nvl72",
    "GB300": "gb300_nvl72",
    "V100-SXM2-16GB": "v100",
    "V100-SXM2-32GB": "v100",
    "V100-SXM3-32GB": "v100",
    "MI300X": "mi300x",
    "MI325X": "mi325x",
    "MI355X": "mi355x",
    "A10G-24GB": "a10g",
    "L40S": "l40s_pcie",
}
# GB/s per GPU and direction between nodes, where the source says something else than the preset.
_NETWORKS = {
    "Omni-Path between nodes (up to 400 Gbps": 12.5,  # four GPUs
    "Omni-Path between nodes, 4 links per 8-GPU": 6.25,
    "Vela": 3.1,  # two 100 Gb/s cards for eight GPUs
    "1600 Gbps": 25.0,
}
_PRECISIONS: Mapping[str | None, Precision] = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "nvfp4": "nvfp4",
    "fp8": "fp8",
    "mxfp8": "fp8",
    "fp8-mx": "fp8",
    "fp8-cs": "fp8",
    "fp8-ds": "fp8",
    "fp8-sc": "fp8",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row as the planner sees it; `measured_*` are None where the source does not print them."""

    id: str
    source: str  # the first word of the id
    row: Mapping[str, Any]
    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    plan: Plan
    capabilities: Capabilities
    measured_step_s: float | None
    measured_memory_gib: float | None


def case_of(row: Mapping[str, Any]) -> Case | str:
    """Return the planning problem of one row, or one sentence why there is none."""
    try:
        return _case(row)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def _case(row: Mapping[str, Any]) -> Case | str:
    missing = [
        name for name in ("layers", "hidden", "heads", "vocab", "seq_len") if not row["model"].get(name)
    ]
    missing += [name for name in ("num_gpus", "mbs", "gbs", "gpu") if not row.get(name)]
    if missing:
        return f"the row lacks {', '.join(missing)}"
    if row["model"].get("hybrid"):
        return f"model.hybrid={row['model']['hybrid']} is not a transformer of one kind of layer"
    if row["gpu"] not in PRESETS:
        return f"gpu={row['gpu']} has no preset"
    if row["precision"] not in (*_PRECISIONS, None):
        return f"precision={row['precision']} is not planned for"
    cluster = _cluster(row)
    capabilities = _capabilities(row)
    model = _model(row)
    training = TrainingSpec(
        sequence_length=int(row["model"]["seq_len"]),
        global_batch_size=int(row["gbs"]),
        num_steps=1,
        precision=_precision(row, cluster),
    )
    return Case(
        id=row["id"],
        source=row["id"].rpartition("-")[0] or row["id"],
        row=row,
        model=model,
        cluster=cluster,
        training=training,
        plan=_plan(row, model, training, capabilities),
        capabilities=capabilities,
        measured_step_s=measured_step_s(row, model),
        measured_memory_gib=measured_memory_gib(row),
    )


def measured_step_s(row: Mapping[str, Any], model: ModelSpec) -> float | None:
    """Return seconds of one step: printed, or from the printed samples, tokens or FLOPs per second."""
    derived = row.get("derived") or {}
    tokens = int(row["gbs"]) * int(row["model"]["seq_len"])
    if printed := row.get("step_time_s") or derived.get("step_time_s"):
        return float(printed)
    if rate := row.get("tokens_per_s_per_gpu") or derived.get("tokens_per_s_per_gpu"):
        return tokens / float(rate) / int(row["num_gpus"])
    if rate := row.get("samples_per_s"):
        return int(row["gbs"]) / float(rate)
    flops = _counted_flops_per_token(row.get("flop_formula"), model, int(row["model"]["seq_len"]))
    if flops and row.get("tflops_per_gpu"):
        return flops * tokens / (float(row["tflops_per_gpu"]) * 1e12 * int(row["num_gpus"]))
    return None


def _counted_flops_per_token(formula: str | None, model: ModelSpec, sequence_length: int) -> float | None:
    """Return the FLOPs that a source counts for one token, by the name of its formula."""
    layers, hidden = model.num_layers, model.hidden_size
    scores = 12.0 * layers * model.num_attention_heads * model.head_size * sequence_length
    matrices = 6.0 * (model.num_active_parameters - model.embedding_parameters)
    if model.tied_embeddings:
        matrices += 6.0 * model.vocab_size * hidden
    forms = {
        "model_full": matrices + scores,
        "model_causal": model.flops_per_token(sequence_length),
        "model_megatron_unspecified": matrices + scores,  # Megatron-core counts without the causal half
        "6N_total+12Lhs": 6.0 * model.num_active_parameters + scores,
        "8N_hw": 8.0 * model.num_active_parameters,
        "6N": 6.0 * model.num_active_parameters,
        # Narayanan et al. 2021, equation 3, whose count includes full recomputation
        "narayanan_hw": 96.0
        * layers
        * hidden**2
        * (1 + sequence_length / (6 * hidden) + model.vocab_size / (16 * layers * hidden)),
    }
    return forms.get(formula or "")


def measured_memory_gib(row: Mapping[str, Any]) -> float | None:
    """Return the printed peak; decimal gigabytes are converted where the source says GB of PyTorch or nvidia-smi."""
    return row.get("memory_gib_peak")


def _precision(row: Mapping[str, Any], cluster: ClusterSpec) -> Precision:
    # Where nothing is printed: the half precision that the device is fast in.
    default: Precision = "bf16" if "bf16" in cluster.gpu.peak_tflops else "fp16"
    return _PRECISIONS[row["precision"]] if row["precision"] else default


@cache
def _preset(name: str) -> ClusterSpec:
    (job,) = jobs([f"cluster={name}", "training.precision=fp32"])
    return job.cluster


def _cluster(row: Mapping[str, Any]) -> ClusterSpec:
    cluster = _preset(PRESETS[row["gpu"]])
    per_node = min(int(row.get("gpus_per_node") or cluster.gpus_per_node), int(row["num_gpus"]))
    if row["gpu"] == "V100-SXM2-16GB":
        cluster = replace(cluster, gpu=replace(cluster.gpu, memory_gib=15.8))
    cluster = replace(cluster, num_nodes=math.ceil(int(row["num_gpus"]) / per_node), gpus_per_node=per_node)
    links = cluster.links
    if links[0].size is not None and links[0].size < 72:
        links = (replace(links[0], size=per_node), *links[1:])
    for words, gb_per_s in _NETWORKS.items():
        if words in (row.get("interconnect") or ""):
            links = (*links[:-1], replace(links[-1], gb_per_s=gb_per_s))
    return replace(cluster, links=links)


def _model(row: Mapping[str, Any]) -> ModelSpec:
    shape = row["model"]
    moe, mla = shape.get("moe"), shape.get("mla")
    # Where nothing is printed: the shape of GPT-2 for old models, of Llama for new ones.
    gated = (
        bool(shape["gated_mlp"]) if shape.get("gated_mlp") is not None else "llama" in (shape["name"] or "")
    )
    sequence = int(shape["seq_len"])
    hidden = int(shape["hidden"])
    ffn = int(shape.get("ffn") or 4 * hidden)
    window = (
        (shape.get("swa") or {}).get("window") if isinstance(shape.get("swa"), Mapping) else shape.get("swa")
    )
    return ModelSpec(
        name=str(shape["name"]),
        model_type="llama" if gated else "gpt2",
        num_layers=int(shape["layers"]),
        hidden_size=hidden,
        num_attention_heads=int(shape["heads"]),
        num_kv_heads=int(shape["kv_heads"]) if shape.get("kv_heads") else None,
        head_dim=int(shape["head_dim"]) if shape.get("head_dim") else None,
        ffn_hidden_size=ffn,
        vocab_size=int(shape["vocab"]),
        max_position_embeddings=max(sequence, 1024),
        gated_mlp=gated,
        tied_embeddings=bool(
            shape.get("tied_embeddings") if shape.get("tied_embeddings") is not None else not gated
        ),
        norm="rmsnorm" if gated else "layernorm",
        sliding_window=int(window) if window and not isinstance(shape.get("swa"), Mapping) else None,
        moe=MoeSpec(
            num_experts=int(moe["experts"]),
            top_k=int(moe["topk"]),
            expert_ffn_hidden_size=int(moe["ffn"]),
            shared_ffn_hidden_size=int(moe.get("shared_ffn") or 0),
            num_dense_layers=int(moe.get("dense_layers") or 0),
        )
        if moe
        else None,
        mla=MlaSpec(
            q_lora_rank=int(mla["q_lora_rank"] or 0),
            kv_lora_rank=int(mla["kv_lora_rank"]),
            qk_nope_head_dim=int(mla["qk_head_dim"]),
            qk_rope_head_dim=int(mla["qk_rope_dim"]),
            v_head_dim=int(mla["v_head_dim"]),
        )
        if mla
        else None,
    )


def _plan(
    row: Mapping[str, Any], model: ModelSpec, training: TrainingSpec, capabilities: Capabilities
) -> Plan:
    tp, pp, cp = (int(row.get(key) or 1) for key in ("tp", "pp", "cp"))
    dp = int(row.get("dp") or int(row["num_gpus"]) // (tp * pp * cp))
    mbs = int(row["mbs"])
    recompute: Recompute = row["recompute"] if row.get("recompute") in ("selective", "full") else "none"
    offload = str(row.get("offload") or "")
    experts = model.moe is not None
    ep = int(row.get("ep") or 1) if experts else 1
    etp = int(row.get("etp") or (1 if ep > 1 else tp)) if experts else 1
    zero = 3 if row.get("fsdp") and row.get("zero_stage") is None else int(row.get("zero_stage") or 0)
    return Plan(
        strategy=str(row.get("framework") or "unknown"),
        dp=dp,
        tp=tp,
        pp=pp,
        vp=int(row.get("vp") or 1) if pp > 1 else 1,
        cp=cp,
        ep=ep,
        etp=etp,
        zero_stage=zero,
        micro_batch_size=mbs,
        num_microbatches=max(1, round(int(row["gbs"]) / (dp * mbs))),
        recompute=recompute,
        recompute_modules=_modules(row),
        sequence_parallel=bool(row.get("sequence_parallel")) and tp > 1,
        offload_optimizer="optimizer" in offload,
        offload_parameters="params" in offload,
        precision=training.precision,
        rank_order=capabilities.rank_order,
    )


_MODULES = ("core_attn", "mla_up_proj", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


def _modules(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return Megatron-core's words for what is recomputed, where the row names modules."""
    if row.get("recompute") != "selective":
        return ()
    detail = str(row.get("recompute_detail") or "")
    words = detail.replace(",", " ").replace("(", " ").replace(")", " ").split()
    found = tuple(name for name in _MODULES if name in words)
    if "norm" in words and "act" in words:
        found = ("layernorm", "moe_act")
    return found


def _capabilities(row: Mapping[str, Any]) -> Capabilities:
    name = str(row.get("framework") or "")
    extra = row.get("extra") or {}
    state = StateBytes(weights=2, gradients=4, optimizer=12)
    return Capabilities(
        zero_stages=frozenset({0, 1, 2, 3}),
        precisions=frozenset(_PRECISIONS.values()),
        recompute=frozenset({"none", "selective", "full"}),
        state_bytes=dict.fromkeys(_PRECISIONS.values(), state),
        degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
        sequence_parallel=True,
        rank_order=("tp", "cp", "dp", "pp"),
        execution=_execution(row, name, extra),
    )


def _execution(row: Mapping[str, Any], name: str, extra: Mapping[str, Any]) -> Execution:
    return Execution(fused_kernels=True, frozen_weights=row.get("task") in ("lora", "qlora"))
