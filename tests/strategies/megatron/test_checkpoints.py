"""Saving and loading on one rank; other degrees are in tests/integration/test_parity_megatron.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies.megatron import MegatronStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

Tiny = tuple[ModelSpec, TrainingSpec]
# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
PLAN = Plan(strategy="megatron", dp=1, micro_batch_size=2, num_microbatches=2, precision="fp32")


def batches() -> list[Any]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, 60, (2, 9)) for _ in range(2)]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_what_was_saved_goes_on_to_the_last_bit(
    tiny: Tiny, tiny_weights: Path, tmp_path: Path, zero_stage: int
) -> None:
    plan = replace(PLAN, zero_stage=zero_stage)
    strategy = MegatronStrategy()
    strategy.setup(plan, *tiny, tiny_weights)
    for _ in range(2):
        strategy.train_step(batches(), learning_rate=1e-2)
    strategy.save(tmp_path)
    # Saving changes nothing, and training goes on.
    unbroken = [strategy.train_step(batches(), learning_rate=1e-2).loss for _ in range(2)]
    strategy.teardown()
    resumed = MegatronStrategy()
    resumed.setup(plan, *tiny, tiny_weights)
    resumed.load(tmp_path)
    assert [resumed.train_step(batches(), learning_rate=1e-2).loss for _ in range(2)] == unbroken
    resumed.teardown()
