"""How the framework of a published row ran its layers: kernels, graphs, and what it overlapped.

Guesses from the framework's name, its time and the settings that the row prints; the planner reads none of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from strategies.base import Execution

_GRAPHS: Mapping[str, Any] = {"transformer_engine": "partial", "full_iteration": "full", "local": "partial"}
_ALEPH_KERNELS: Mapping[str, Any] = {
    "torch": "unfused",
    "fused": "fused_softmax",
    "flash_attentionv1.0.8": "flash1",
    "flash_attention2": "flash",
}
# Where a source says that its router is learned and drops no token; the pairs that it prints differ by about so much.
_LEARNED_IMBALANCE = 1.5


# Operators of PyTorch one by one.
_EAGER = (
    "Transformers",
    "Accelerate",
    "LitGPT",
    "torchtune",
    "AutoModel",
    "nanotron",
    "picotron",
    "nnScaler",
)


def execution_of(row: Mapping[str, Any]) -> Execution:
    """Return how the framework of a row ran it."""
    name, extra = str(row.get("framework") or ""), row.get("extra") or {}
    base = Execution(frozen_weights=row.get("task") in ("lora", "qlora"))
    if "Aleph" in name:
        kernel = str(extra.get("kernel"))
        return replace(
            base,
            fused_kernels="RMS" in kernel,
            attention=_ALEPH_KERNELS.get(kernel.partition(" ")[0], "flash"),
            split_messages=False,
            overlap_parameters=False,
        )
    if _is_megatron_core(row, name):
        return _megatron_core(base, row, name, extra)
    if _has(name, "old branch", "HF Transformers Trainer + DeepSpeed"):
        # ZeRO-3 of 2021 fetched weights when they were needed.
        return replace(base, attention="unfused", overlap_gradients=False, overlap_parameters=False)
    if "Megatron" in name:  # before FlashAttention
        # Megatron-LM 2.6 of 2022 (Korthikanti et al.), not its forks.
        year = re.search(r"\b20\d\d\b", str(row.get("version")))
        newer = name.startswith("Megatron-LM") and year is not None and year[0] >= "2022"
        return replace(
            base,
            fused_kernels=True,
            attention="fused_softmax",
            fused_accumulation=newer,
            overlap_tp_backward=newer,
            split_messages="DeepSpeed" not in name,
            overlap_gradients=False,
            overlap_parameters=False,
        )
    if _has(name, "torchtitan", "Foundry", "fms"):
        # Foundry's MPT runs the Triton kernel of the first FlashAttention.
        first = "Foundry" in name
        return replace(
            base, fused_kernels=_compiled(extra) and not first, attention="flash1" if first else "flash"
        )
    liger = "Liger" in name
    return replace(
        base,
        fused_kernels=liger or _has(name, "compile", "Thunder") or not _has(name, *_EAGER),
        attention="flash3" if liger or "JAX" in name else "flash",
    )


def _is_megatron_core(row: Mapping[str, Any], name: str) -> bool:
    """Say whether a row ran on Transformer Engine: by its name, or because it is Megatron on a GPU of its time."""
    named = _has(
        name, "Megatron-Core", "Megatron-Bridge", "NeMo", "MLPerf", "TE ", "TransformerEngine", "Primus"
    )
    recent = "Megatron" in name and not str(row.get("gpu")).startswith(("V100", "A100"))
    return (named or recent or str(row.get("id")).startswith("mlperf")) and not _has(name, *_EAGER)


def _megatron_core(base: Execution, row: Mapping[str, Any], name: str, extra: Mapping[str, Any]) -> Execution:
    return replace(
        base,
        fused_kernels=True,
        attention="flash3",
        fused_accumulation=True,
        cuda_graphs=_GRAPHS.get(str(extra.get("cuda_graph_impl")), "none"),
        deduplicated_dispatch=_sends_by_itself(row, extra),
        expert_imbalance=_LEARNED_IMBALANCE if "learned" in str(extra.get("routing")) else 1.0,
        overlap_tp=bool(row.get("sequence_parallel")) and "TE 2.11" not in name,
        overlap_pp=bool(row.get("vp")),
        # Recipes that capture the whole iteration overlap the exchange, whether or not they say so.
        overlap_ep=str(extra.get("moe_a2a_overlap") or extra.get("a2a_overlap")) in ("True", "1")
        or extra.get("cuda_graph_impl") == "full_iteration",
    )


def _sends_by_itself(row: Mapping[str, Any], extra: Mapping[str, Any]) -> bool:
    """Say whether tokens go through DeepEP or HybridEP; the recipes for Hopper that do not say use DeepEP."""
    words = str(extra.get("moe_flex_dispatcher_backend") or extra.get("dispatcher")).lower()
    recipe = "Bridge" in str(row.get("framework")) and str(row.get("gpu")).startswith("H") and words == "none"
    return recipe or "hybridep" in words or "deepep" in words


def _compiled(extra: Mapping[str, Any]) -> bool:
    """Say whether torch.compile ran, in either of the two places where rows say so; by default it did."""
    variant = str(extra.get("variant", "compile")).replace("nocompile", "")
    return str(extra.get("torch_compile", "compile" in variant)) == "True"


def _has(name: str, *words: str) -> bool:
    return any(word in name for word in words)
