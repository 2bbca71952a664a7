"""What the planner may ask of ColossalAI, and the sentences for what it may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.colossalai import CAPABILITIES
from strategies.spec import Plan

PLAN = Plan(strategy="colossalai", dp=4, rank_order=CAPABILITIES.rank_order)

ALLOWED: list[dict[str, Any]] = [
    {},
    {"tp": 2, "pp": 2, "vp": 2, "zero_stage": 1, "sequence_parallel": True},
    {"tp": 2, "pp": 2, "precision": "fp32"},
    {"zero_stage": 1, "precision": "fp32"},
    {"tp": 2, "zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 3, "precision": "fp32"},
    {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    {"pp": 2, "pipeline_split": (3, 5)},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"pp": 2, "zero_stage": 2},
        "colossalai cannot combine plan.zero_stage=2 with plan.pp=2; use plan.zero_stage in 0, 1",
    ),
    (
        {"pp": 2, "zero_stage": 3},
        "colossalai has no pipeline with plan.zero_stage=3 (GeminiPlugin, TorchFSDPPlugin); "
        "use plan.pp=1, or plan.zero_stage in 0, 1",
    ),
    (
        {"zero_stage": 3, "precision": "fp32", "offload_optimizer": True},
        "colossalai offloads nothing in training.precision=fp32 with plan.zero_stage=3 (TorchFSDPPlugin); "
        "use bf16, or plan.zero_stage in 1, 2 with plan.offload_optimizer=true",
    ),
    (
        {"tp": 2, "zero_stage": 3, "precision": "fp32"},
        "colossalai has no tensor parallelism with plan.zero_stage=3 (TorchFSDPPlugin) and plan.tp=2; "
        "use plan.tp=1, or plan.zero_stage in 0, 1, 2",
    ),
    (
        {"tp": 2, "zero_stage": 3},
        "colossalai clips wrongly with plan.zero_stage=3 (GeminiPlugin) and plan.tp=2; "
        "use plan.tp=1, or plan.zero_stage in 0, 1, 2",
    ),
    (
        {"tp": 2, "zero_stage": 1, "precision": "fp32"},
        "colossalai has no training.precision=fp32 with plan.zero_stage=1 beside tensor or pipeline parallelism; "
        "use bf16, or plan.zero_stage=0",
    ),
    (
        {"tp": 2, "zero_stage": 2, "sequence_parallel": True},
        "colossalai accumulates wrong gradients with plan.zero_stage=2 and plan.sequence_parallel=true; "
        "use plan.zero_stage in 0, 1, or plan.sequence_parallel=false",
    ),
    (
        {"zero_stage": 3, "offload_parameters": True},
        "colossalai offloads parameters only together with the optimizer's state; "
        "use plan.offload_optimizer=true, or plan.offload_parameters=false",
    ),
    (
        {"pp": 2, "vp": 2, "pipeline_split": (1, 2, 2, 1)},
        "colossalai has equal chunks only with plan.vp=2; use plan.pipeline_split=null",
    ),
    ({"precision": "fp16"}, "colossalai cannot train in training.precision=fp16; use one of bf16, fp32"),
    ({"cp": 2}, "colossalai does not offer plan.cp=2 here; use plan.cp=1"),
    ({"recompute": "selective"}, "colossalai has no plan.recompute=selective; use one of full, none"),
]


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_what_it_can_do(changes: dict[str, Any]) -> None:
    assert CAPABILITIES.why_not(replace(PLAN, **changes)) is None


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence[:60] for _, sentence in REFUSED])
def test_what_it_cannot_do(changes: dict[str, Any], sentence: str) -> None:
    assert CAPABILITIES.why_not(replace(PLAN, **changes)) == sentence
