"""The norm over everything, and clipping by it, on one rank. Over stages, parts and experts: tests/integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def engine_of(*gradients: float, clip: float = 1.0) -> Any:
    module = torch.nn.Module()
    for index, gradient in enumerate(gradients):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([gradient])
        module.register_parameter(f"p{index}", parameter)
    steps: list[list[float]] = []
    engine = SimpleNamespace(module=module, device="cpu", steps=steps, gradient_clipping=lambda: clip)

    def take_model_step(_: Any) -> None:
        if clip:
            engine.clip_fp32_gradients()
        steps.append([float(p.grad) for p in module.parameters()])

    engine._take_model_step = take_model_step
    return engine


def test_clipping_is_by_the_norm_that_is_reported() -> None:
    from strategies.deepspeed import norms

    engine = engine_of(3.0, 4.0)
    norms.clip_without_zero(engine, None)
    engine._take_model_step(None)
    assert float(engine._global_grad_norm) == 5.0
    assert engine.steps == [pytest.approx([0.6, 0.8], rel=1e-5)]


def test_a_norm_is_reported_where_nothing_is_clipped() -> None:
    from strategies.deepspeed import norms

    engine = engine_of(3.0, 4.0, clip=0.0)
    norms.clip_without_zero(engine, None)
    engine._take_model_step(None)
    assert float(engine._global_grad_norm) == 5.0
    assert engine.steps == [[3.0, 4.0]]


def test_a_copy_of_a_tied_tensor_is_not_counted_again() -> None:
    from strategies.deepspeed import norms

    engine = engine_of(3.0, 4.0, 12.0)
    engine.module.p2.ds_pipe_replicated = True
    assert float(norms.total_norm(engine, None)) == 5.0
