"""What counts as weights, gradients and states of an engine; DeepSpeed's own: tests/integration/test_verify.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies.deepspeed import inspect as subject
from strategies.fake_world import fake_world, storage_bytes

SIZE = 16 * 16 * 4


def plain_engine() -> Any:
    module = torch.nn.Linear(16, 16, bias=False)
    return SimpleNamespace(module=module, optimizer=torch.optim.AdamW(module.parameters()))


def step_of(engine: Any) -> None:
    engine.module(torch.zeros(3, 16)).sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def test_without_zero_the_optimizer_owns_no_second_copy() -> None:
    with fake_world(rank=0, world_size=2) as ledger:
        engine = plain_engine()
        found = subject.inspect(ledger, engine, lambda: step_of(engine))
    assert (found.parameters, found.weight_bytes, found.gradient_bytes) == (256, SIZE, SIZE)
    assert found.optimizer_bytes == pytest.approx(2 * SIZE, abs=8)
    assert found.working_bytes is not None and found.working_bytes >= 0


def test_a_flat_copy_is_the_optimizers() -> None:
    engine = plain_engine()
    flat = torch.nn.Parameter(torch.zeros(64))
    engine.optimizer = SimpleNamespace(param_groups=[{"params": [flat]}])
    assert [owner is flat for owner in subject._masters(engine)] == [True]
    engine.optimizer.fp32_partitioned_groups_flat = [torch.zeros(5)]
    assert [owner.numel() for owner in subject._masters(engine)] == [5]


@pytest.mark.parametrize("reduced", [{0: [torch.zeros(8), None]}, {0: torch.zeros(8)}])
def test_gradients_that_zero_has_reduced_are_not_counted_twice(reduced: Any) -> None:
    engine = plain_engine()
    engine.module.weight.grad = torch.zeros(16, 16)
    assert storage_bytes(subject._gradients(engine)) == SIZE
    engine.optimizer.averaged_gradients = reduced
    assert storage_bytes(subject._gradients(engine)) == 32
