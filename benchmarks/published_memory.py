"""What a published row says about memory: how its framework keeps states and activations, and what it printed.

Guesses about frameworks that a row does not print stand here, as in published.py; the planner reads none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from launcher.cluster.spec import ClusterSpec
from launcher.planner.cost import GIB, MemoryCost
from launcher.planner.price.estimate import usable_bytes
from launcher.planner.price.memory import MemoryModel
from launcher.planner.price.stages import stages_of
from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Recompute, TrainingSpec

# What PyTorch has in use, what its allocator holds, or all that the driver counts on the device.
MemoryKind = Literal["allocated", "reserved", "device"]


def memory_kind(row: Mapping[str, Any]) -> MemoryKind:
    """Return which of the three a row prints."""
    words = f"{row.get('memory_unit')} {row.get('memory_kind')}"
    if "nvidia-smi" in words:
        return "device"
    # torchtitan and what is built on it print the reserved peak.
    if "reserved" in words or "torchtitan" in str(row.get("framework")):
        return "reserved"
    return "allocated"


def figure(printed: Any) -> float | None:
    """Return a printed figure as a number; None where there is none, or no positive one."""
    try:
        value = float(printed)
    except (TypeError, ValueError):
        return None
    return value if 0 < value < math.inf else None


def measured_memory_gib(row: Mapping[str, Any]) -> float | None:
    """Return the printed peak; decimal gigabytes are converted where the program that printed them divides by 10^9."""
    printed = figure(row.get("memory_gib_peak"))
    if printed is None:
        return None
    decimal = "Megatron-Bridge" in str(row.get("framework")) and "GB" in str(row.get("memory_unit"))
    return printed * (1e9 / GIB if decimal else 1.0)


def predicted_memory_gib(memory: MemoryCost, cluster: ClusterSpec, kind: MemoryKind) -> float:
    """Return the prediction of what a row of this kind prints."""
    if kind == "allocated":
        return memory.allocated / GIB
    return memory.total / GIB + (cluster.reserved_gib if kind == "device" else 0.0)


def recompute_of(row: Mapping[str, Any], model: ModelSpec) -> tuple[Recompute, int]:
    """Return what is recomputed, and in how many layers of a stage where not in all."""
    if any(words in str(row.get("recompute_detail")) for words in ("every 2nd", "every other")):
        return "full", max(1, model.num_layers // int(row.get("pp") or 1) // 2)
    if row.get("recompute") is None and "torchtitan" in str(row.get("framework")):
        return "selective", 0  # the default of its configurations
    return (row["recompute"] if row.get("recompute") in ("selective", "full") else "none"), 0


def least_recompute(
    plan: Plan, *, model: ModelSpec, training: TrainingSpec, capabilities: Capabilities, cluster: ClusterSpec
) -> Plan:
    """Return `plan` with the least recomputation that fits: a row that ran and does not print it must have fitted."""
    memory, stages = MemoryModel(model, training, capabilities), stages_of(model, plan)
    usable = usable_bytes(cluster)
    order: tuple[Recompute, ...] = ("none", "selective", "full")
    for recompute in order[order.index(plan.recompute) :]:
        plan = replace(plan, recompute=recompute)
        if all(memory.of(plan, stage)[0].total <= usable for stage in stages):
            break
    return plan


def state_bytes(row: Mapping[str, Any]) -> StateBytes:
    """Return what a parameter costs in the framework of a row."""
    name = str(row.get("framework") or "")
    if _has(name, "torchtitan", "Foundry", "fms", "AutoModel", "FSDP"):
        # FSDP shards fp32 weights, gathers them in 16 bits and reduces gradients in fp32; adapters leave 16 bits.
        adapters = row.get("task") in ("lora", "qlora")
        return StateBytes(weights=2 if adapters else 4, gradients=4, optimizer=8, gathered=2)
    if "Aleph" in name:
        return StateBytes(weights=2, gradients=2, optimizer=12)
    if "Megatron-DeepSpeed" in name:
        # ZeRO 1 in fp16 widens a rank's shard of the gradients for the step; the later BF16_Optimizer keeps gradients
        # in bf16, their fp32 sums and a flat copy of them on every rank.
        if row.get("precision") == "bf16":
            return StateBytes(weights=2, gradients=4, gradient_copies=4, optimizer=12, step=2)
        return StateBytes(weights=2, gradients=2, optimizer=12, step=6)
    if "DeepSpeed" in name:
        return StateBytes(weights=2, gradients=2, optimizer=12, gathered=2)
    if "nanotron" in name:
        # Gradients in bf16 live until the whole backward pass is over, then they are added to fp32 sums.
        return StateBytes(weights=2, gradients=4, gradient_copies=2, optimizer=12)
    # NVIDIA's recipes for speed reduce gradients in bf16 (grad_reduce_in_fp32=False).
    narrow = _has(name, "NeMo", "Megatron-Bridge", "MLPerf")
    # Its recipes for DeepSeek's models and Moonlight keep Adam's moments in bf16.
    moments = 2 if narrow and _has(str((row.get("model") or {}).get("name")), "deepseek", "moonlight") else 4
    return StateBytes(
        weights=2,
        gradients=2 if narrow else 4,
        optimizer=4 + 2 * moments,
        fresh_gradients=0 if narrow else 2,
    )


def bucket_elements(row: Mapping[str, Any]) -> int:
    """Return what the framework's communication buckets hold: DeepSpeed's defaults for reducing and gathering."""
    name = str(row.get("framework") or "")
    if "HF" in name and "DeepSpeed" in name:
        return int(row["model"]["hidden"]) ** 2  # "auto"
    return 10**9 if "Megatron-DeepSpeed" in name and row.get("precision") != "bf16" else 0


def pipeline_split(row: Mapping[str, Any], model: ModelSpec, pp: int) -> tuple[int, ...]:
    """Return the layers of each stage where the framework does not divide them evenly."""
    if "nanotron" not in str(row.get("framework")) or pp == 1:
        return ()
    # Blocks in order, by their parameters; a stage is full with the block that exceeds its share.
    layer = float(model.dense_layer_parameters)
    total = model.num_layers * layer + model.vocab_size * model.hidden_size
    split, stage = [0] * pp, 0
    for number in range(1, model.num_layers + 1):
        split[stage] += 1
        stage += number * layer > total * (stage + 1) / pp
    return tuple(split)


def with_memory(execution: Execution, row: Mapping[str, Any]) -> Execution:
    """Return `execution` with what only memory depends on."""
    name, offload = str(row.get("framework") or ""), str(row.get("offload") or "")
    torch_native = _has(name, "torchtitan", "Foundry", "fms")
    stored_scores = execution.attention in ("fused_softmax", "unfused")
    layers = [int(word) for word in offload.split() if word.isdigit()] if "activation" in offload else []
    return replace(
        execution,
        dropout=stored_scores and "Aleph" not in name,
        eager_activation="Aleph" in name or "nanotron" in name,
        quantized_inputs=not torch_native,
        selective_operators=torch_native,
        # The script of DeepSpeed's first ZeRO 3 branch: PA=true, PA_CPU=true.
        checkpoints="host" if "old branch" in name else "whole",
        offloaded_layers=layers[0] if layers else 0,
        bytes_per_logit=_bytes_per_logit(row, name),
        # Its out-of-memory rows end where the last stage would hold the logits of all 128k words.
        gathered_logits="Aleph" in name,
    )


def _bytes_per_logit(row: Mapping[str, Any], name: str) -> float | None:
    if "Liger" in name:
        return 0
    path = str((row.get("source") or {}).get("path"))
    if "TE " in name or ("Megatron-Bridge" in name and "performance" in path):
        return 2  # Transformer Engine's kernel works in place
    if "Foundry" in name:
        return 4  # FlashAttention's kernel: the logits and their gradient
    if "torchtitan" in name and str(row.get("version")) >= "2025-06":
        return 6
    if "torchtitan" in name or "Aleph" in name:
        return 14  # eager; torchtitan compiled its loss later than the layers
    if "Megatron" in name or "nanotron" in name or "NeMo" in name:
        return 10
    return None


def _has(name: str, *words: str) -> bool:
    return any(word in name for word in words)
