"""Snapshots on one rank; over several, in all plans: tests/integration/test_parity_megatron.py."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
def test_a_snapshot_is_of_the_moment_it_was_taken(
    tiny: Tiny, tiny_weights: Path, tmp_path: Path, zero_stage: int
) -> None:
    plan = replace(PLAN, zero_stage=zero_stage)
    strategy = MegatronStrategy()
    strategy.setup(plan, *tiny, tiny_weights)
    strategy.train_step(batches(), learning_rate=1e-2)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    write = strategy.snapshot(tmp_path)
    assert strategy.snapshot_bytes() > 0
    unbroken = [strategy.train_step(batches(), learning_rate=1e-2).loss for _ in range(2)]
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    strategy.teardown()
    resumed = MegatronStrategy()
    resumed.setup(plan, *tiny, tiny_weights)
    resumed.load(tmp_path)
    assert [resumed.train_step(batches(), learning_rate=1e-2).loss for _ in range(2)] == unbroken
    resumed.teardown()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_every_snapshot_holds_its_own_moment(
    tiny: Tiny, tiny_weights: Path, tmp_path: Path, zero_stage: int
) -> None:
    plan = replace(PLAN, zero_stage=zero_stage)
    strategy = MegatronStrategy()
    strategy.setup(plan, *tiny, tiny_weights)
    losses = [strategy.train_step(batches(), learning_rate=1e-2).loss]
    for number in range(1, 4):
        (tmp_path / str(number)).mkdir()
        write = strategy.snapshot(tmp_path / str(number))
        losses.append(strategy.train_step(batches(), learning_rate=1e-2).loss)
        write()
    strategy.teardown()
    resumed = MegatronStrategy()
    resumed.setup(plan, *tiny, tiny_weights)
    for number in (3, 2, 1):
        resumed.load(tmp_path / str(number))
        assert resumed.train_step(batches(), learning_rate=1e-2).loss == losses[number]
    resumed.teardown()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_memory_stated_is_what_is_copied_and_gathered(
    tiny: Tiny, tiny_weights: Path, tmp_path: Path, zero_stage: int
) -> None:
    strategy = MegatronStrategy()
    strategy.setup(replace(PLAN, zero_stage=zero_stage), *tiny, tiny_weights)
    strategy.train_step(batches(), learning_rate=1e-2)
    whole = 3 * 4 * sum(each.numel() for each in strategy._chunks[0].parameters())  # fp32, two moments
    stated = whole if zero_stage == 0 else 4 / 3 * whole + 2 * whole
    assert strategy.snapshot_bytes() == pytest.approx(stated, rel=0.02)
    strategy.teardown()
