"""Totals are sums of parts; rates follow from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.planner.cost import CostBreakdown, MemoryCost, TimeCost, parts

MEMORY = MemoryCost(weights=1, gradients=2, optimizer=3, activations=4, logits=5, buffers=6)
TIME = TimeCost(
    compute=1.0,
    recompute=0.5,
    tp=0.1,
    cp=0.1,
    ep=0.1,
    pp=0.1,
    dp=0.05,
    bubble=0.03,
    optimizer=0.02,
    offload=0.0,
)
COST = CostBreakdown(
    memory=MEMORY,
    host_bytes=0,
    disk_bytes=0,
    stage=0,
    time=TIME,
    tokens_per_step=800,
    num_gpus=4,
    model_flops_per_step=4e12,
    peak_flops=1e12,
)


def test_totals_are_sums_of_all_parts() -> None:
    assert MEMORY.total == 21
    assert list(parts(MEMORY)) == [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "buffers",
        "slack",
    ]
    assert TIME.total == pytest.approx(2.0)


def test_rates() -> None:
    assert COST.step_s == pytest.approx(2.0)
    assert COST.tokens_per_s_per_gpu == pytest.approx(100)
    assert COST.mfu == pytest.approx(0.5)


def test_a_guessed_peak_gives_no_mfu() -> None:
    assert replace(COST, peak_flops=None).mfu is None
