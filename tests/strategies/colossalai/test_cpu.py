"""The compatibility layer without the engine: refusals, releases, its Adam. With the engine: tests/integration."""

from __future__ import annotations

import re

import pytest
import torch

from strategies.colossalai import cpu
from strategies.spec import Plan


def test_what_needs_a_gpu_is_refused() -> None:
    plan = Plan(strategy="colossalai", dp=2, zero_stage=3, offload_optimizer=True)
    assert cpu.why_not(plan) == (
        "plan.offload_optimizer=true with plan.zero_stage=3 moves Gemini's chunks between a GPU and the host, "
        "and no GPU is here; use plan.offload_optimizer=false"
    )
    assert cpu.why_not(Plan(strategy="colossalai", dp=2, zero_stage=2, offload_optimizer=True)) is None


@pytest.mark.parametrize(("package", "found"), [("colossalai", "0.5.1"), ("torch", "2.130.0+cpu")])
def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch, package: str, found: str) -> None:
    releases = {"colossalai": "0.5.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(cpu, "version", {**releases, package: found}.__getitem__)
    with pytest.raises(
        RuntimeError, match=re.escape(f"made to work with {package} {cpu.WRITTEN_FOR[package]}, and {found}")
    ):
        cpu._check_releases()


def test_the_release_it_was_written_for_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "version", {"colossalai": "0.5.0", "torch": "2.13.0+cpu"}.__getitem__)
    cpu._check_releases()


def test_nothing_is_touched_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_check_releases", lambda: pytest.fail("looked at releases"))
    cpu.enable.__wrapped__()


@pytest.mark.parametrize("scale", [-1.0, 4.0])
def test_adam_moves_as_torch_does(scale: float) -> None:
    torch.manual_seed(0)
    ours, mean, square = torch.randn(64), torch.zeros(64), torch.zeros(64)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    kernel = cpu._Adam(1e-2, 0.9, 0.95, 1e-8, 0.1, True)
    for step in range(1, 6):
        gradient = torch.randn(64)
        theirs.grad = gradient / scale if scale > 0 else gradient.clone()
        reference.step()
        kernel.step(step, 1e-2, 0.9, 0.95, 1e-8, 0.1, True, ours, gradient, mean, square, scale)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_another_adam_is_refused() -> None:
    with pytest.raises(AssertionError):
        cpu._Adam(1e-2, 0.9, 0.95, 1e-8, 0.1, False)
