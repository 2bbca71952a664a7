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

from benchmarks.published_execution import execution_of
from benchmarks.published_memory import (
    bucket_elements,
    figure,
    least_recompute,
    measured_memory_gib,
    pipeline_split,
    recompute_of,
    state_bytes,
    with_memory,
)
from launcher.cluster.spec import ClusterSpec
from launcher.compose import jobs
from launcher.planner.problem import PlanRequest, Problem
from strategies.base import Capabilities
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, Precision, TrainingSpec

PRESETS = {
    "A100-SXM4-40GB": "a100_40gb",
    "A100-SXM4-80GB": "a100_80gb",
    "H100-SXM5-80GB": "h100_sxm",
    "H100-96GB-HBM2e-500W": "grand_teton",
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
    "Omni-Path between nodes (up to 400 Gbps": 2.5,  # four GPUs; no GPUDirect: a fifth of the cards arrives
    "Omni-Path between nodes, 4 links per 8-GPU": 3.75,
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

    def problem(self, strategy: str) -> Problem:
        """Return the question that the planner would be asked, with nothing pinned."""
        return Problem(
            model=self.model,
            cluster=self.cluster,
            training=self.training,
            request=PlanRequest(),
            strategies=(strategy,),
        )


# What a row that does not keep to the format may raise.
FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


def case_of(row: Any) -> Case | str:
    """Return the planning problem of one row, or one sentence why there is none."""
    if not isinstance(row, Mapping) or not isinstance(row.get("model") or {}, Mapping):
        return "the row, or its model, is not an object with keys"
    try:
        return _why_not(row) or _case(row)
    except FAULTS as error:
        return f"the row cannot be read: {type(error).__name__}: {error}"


def _why_not(row: Mapping[str, Any]) -> str | None:
    """Return one sentence why a row cannot be planned, or None."""
    shape = row.get("model") or {}
    missing = [name for name in ("layers", "hidden", "heads") if not shape.get(name)]
    missing += ["vocab"] if not _vocabulary(row) else []
    missing += ["seq_len"] if not shape.get("seq_len") else []
    missing += [name for name in ("num_gpus", "mbs", "gbs", "gpu") if not row.get(name)]
    if missing:
        return f"the row lacks {', '.join(missing)}"
    if shape.get("hybrid"):
        return f"model.hybrid={shape['hybrid']} is not a transformer of one kind of layer"
    if _preset_name(row) is None:
        return f"gpu={row['gpu']} has no preset"
    if row.get("precision") not in (*_PRECISIONS, None):
        return f"precision={row['precision']} is not planned for"
    extra = row.get("extra") or {}
    schedule = extra.get("pp_schedule") or extra.get("schedule")
    # Interleaved 1F1B has many spellings; zero-bubble and V schedules have names of their own.
    if schedule and int(row.get("pp") or 1) > 1 and "1f1b" not in str(schedule).lower():
        return f"schedule={schedule} is not planned for"
    return None


def _vocabulary(row: Mapping[str, Any]) -> int:
    """Return the rows of the token table: printed, or GPT-2's as Megatron-LM pads it; 0: not known."""
    shape = row.get("model") or {}
    if not shape.get("vocab") and "Megatron" in str(row.get("framework")) and "gpt" in str(shape.get("name")):
        return 50304
    return int(shape.get("vocab") or 0)


def _case(row: Mapping[str, Any]) -> Case | str:
    name, cluster = str(row.get("id")), _cluster(row)
    capabilities = _capabilities(row)
    model = _model(row)
    training = TrainingSpec(
        sequence_length=int(row["model"]["seq_len"]),
        global_batch_size=int(row["gbs"]),
        num_steps=1,
        precision=_precision(row, cluster),
    )
    plan = _plan(row, model, training, capabilities)
    if contradiction := _contradiction(row, plan):
        return contradiction
    if row.get("recompute") is None:
        plan = least_recompute(
            plan, model=model, training=training, capabilities=capabilities, cluster=cluster
        )
    return Case(
        id=name,
        source=name.rpartition("-")[0] or name,
        row=row,
        model=model,
        cluster=cluster,
        training=training,
        plan=plan,
        capabilities=capabilities,
        measured_step_s=measured_step_s(row, model),
        measured_memory_gib=measured_memory_gib(row),
    )


def _contradiction(row: Mapping[str, Any], plan: Plan) -> str | None:
    """Return one sentence where the layout that a row prints cannot have run."""
    if plan.world_size != int(row["num_gpus"]):
        return f"dp * tp * pp * cp={plan.world_size} is not num_gpus={row['num_gpus']}"
    if plan.global_batch_size != int(row["gbs"]):
        return f"gbs={row['gbs']} is not a multiple of dp={plan.dp} * mbs={plan.micro_batch_size}"
    ranks = plan.dp * plan.cp * plan.tp
    if ranks % (plan.ep * plan.etp):
        return f"ep={plan.ep} * etp={plan.etp} does not divide the {ranks} ranks of a pipeline stage"
    return None


def measured_step_s(row: Mapping[str, Any], model: ModelSpec) -> float | None:
    """Return seconds of one step: printed, or from the printed samples, tokens or FLOPs per second."""
    derived = row.get("derived") or {}
    tokens = int(row["gbs"]) * int(row["model"]["seq_len"])
    if seconds := figure(row.get("step_time_s")) or figure(derived.get("step_time_s")):
        return seconds
    if rate := figure(row.get("tokens_per_s_per_gpu")) or figure(derived.get("tokens_per_s_per_gpu")):
        return tokens / rate / int(row["num_gpus"])
    if rate := figure(row.get("samples_per_s")):
        return int(row["gbs"]) / rate
    flops = _counted_flops_per_token(row.get("flop_formula"), model, int(row["model"]["seq_len"]))
    if flops and (tflops := figure(row.get("tflops_per_gpu"))):
        return flops * tokens / (tflops * 1e12 * int(row["num_gpus"]))
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
        "korthikanti_model_full": matrices + scores,
        "model_causal": model.flops_per_token(sequence_length),
        "model_megatron_unspecified": matrices + scores,  # Megatron-core counts without the causal half
        "6N_total+12Lhs": 6.0 * model.num_active_parameters + scores,
        "8N_hw": 8.0 * model.num_active_parameters,
        "6N": 6.0 * model.num_active_parameters,
        "6N_noattn": matrices,
        # No gradients of frozen weights: two thirds.
        "lora_4N_noattn": matrices * 2 / 3,
        "lora_causal": model.flops_per_token(sequence_length) * 2 / 3,
        # Narayanan et al. 2021, equation 3, whose count includes full recomputation
        "narayanan_hw": 96.0
        * layers
        * hidden**2
        * (1 + sequence_length / (6 * hidden) + model.vocab_size / (16 * layers * hidden)),
    }
    return forms.get(str(formula))


def _precision(row: Mapping[str, Any], cluster: ClusterSpec) -> Precision:
    # Where nothing is printed: the half precision that the device is fast in.
    default: Precision = "bf16" if "bf16" in cluster.gpu.peak_tflops else "fp16"
    return _PRECISIONS[row["precision"]] if row.get("precision") else default


def _preset_name(row: Mapping[str, Any]) -> str | None:
    """Return the preset of a row's GPU: by its name, else that of the chip."""
    gpu = str(row["gpu"])
    # torchao measures on the 500 W parts of the torchtitan benchmarks, sold as H100 SXM all the same.
    if gpu.startswith("H100") and "torchao" in str(row.get("framework")):
        return "grand_teton"
    chip, *parts = gpu.split("-")
    alike = [known for known in PRESETS if known.split("-")[0] == chip]
    if gpu in PRESETS or not alike:
        return PRESETS.get(gpu)
    return PRESETS[max(alike, key=lambda known: sum(part in known for part in parts))]


@cache
def _preset(name: str) -> ClusterSpec:
    (job,) = jobs([f"cluster={name}", "training.precision=fp32"])
    return job.cluster


def _cluster(row: Mapping[str, Any]) -> ClusterSpec:
    name = _preset_name(row)
    assert name, "rows without a preset are refused before"
    cluster = _preset(name)
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
    name = str(shape.get("name"))
    # Where nothing is printed: the shape of GPT-2 for old models, of Llama for new ones.
    gated = bool(shape["gated_mlp"]) if shape.get("gated_mlp") is not None else "llama" in name
    tied = shape.get("tied_embeddings")
    sequence = int(shape["seq_len"])
    hidden = int(shape["hidden"])
    ffn = int(shape.get("ffn") or 4 * hidden)
    # A window in some layers only is an object, and not planned for.
    window = shape.get("swa") if not isinstance(shape.get("swa"), Mapping) else None
    return ModelSpec(
        name=name,
        model_type="llama" if gated else "gpt2",
        num_layers=int(shape["layers"]),
        hidden_size=hidden,
        num_attention_heads=int(shape["heads"]),
        num_kv_heads=int(shape["kv_heads"]) if shape.get("kv_heads") else None,
        head_dim=int(shape["head_dim"]) if shape.get("head_dim") else None,
        ffn_hidden_size=ffn,
        vocab_size=_vocabulary(row),
        max_position_embeddings=max(sequence, 1024),
        gated_mlp=gated,
        learned_positions=not gated,
        tied_embeddings=bool(tied if tied is not None else not gated),
        norm="rmsnorm" if gated else "layernorm",
        sliding_window=int(window) if window else None,
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
            q_lora_rank=int(mla.get("q_lora_rank") or 0),
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
    recompute, num_layers = recompute_of(row, model)
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
        pipeline_split=pipeline_split(row, model, pp),
        recompute=recompute,
        recompute_num_layers=num_layers,
        recompute_modules=_modules(row),
        sequence_parallel=bool(row.get("sequence_parallel")) and tp > 1,
        # The script of DeepSpeed's first ZeRO 3 branch: --cpu-optimizer.
        offload_optimizer="optimizer" in offload or "old branch" in str(row.get("framework")),
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
    return Capabilities(
        zero_stages=frozenset({0, 1, 2, 3}),
        precisions=frozenset(_PRECISIONS.values()),
        recompute=frozenset({"none", "selective", "full"}),
        state_bytes=dict.fromkeys(_PRECISIONS.values(), state_bytes(row)),
        buffer_elements=bucket_elements(row),
        degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}),
        sequence_parallel=True,
        rank_order=("tp", "cp", "dp", "pp"),
        execution=with_memory(execution_of(row), row),
    )
