"""Snapshots on one rank; over several, in all plans: tests/integration/test_parity_megatron.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from strategies.megatron import MegatronStrategy

# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
Start, Losses = Callable[..., MegatronStrategy], Callable[..., list[float]]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_snapshot_is_of_the_moment_it_was_taken(
    start: Start, losses: Losses, tmp_path: Path, zero_stage: int
) -> None:
    strategy = start(zero_stage)
    losses(strategy)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    write = strategy.snapshot(tmp_path)
    assert strategy.snapshot_bytes() > 0
    unbroken = losses(strategy, 2)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    strategy.teardown()
    resumed = start(zero_stage)
    resumed.load(tmp_path)
    assert losses(resumed, 2) == unbroken
    resumed.teardown()


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_every_snapshot_holds_its_own_moment(
    start: Start, losses: Losses, tmp_path: Path, zero_stage: int
) -> None:
    strategy = start(zero_stage)
    told = losses(strategy)
    for number in range(1, 4):
        (tmp_path / str(number)).mkdir()
        write = strategy.snapshot(tmp_path / str(number))
        told += losses(strategy)
        write()
    strategy.teardown()
    resumed = start(zero_stage)
    for number in (3, 2, 1):
        resumed.load(tmp_path / str(number))
        assert losses(resumed) == [told[number]]
    resumed.teardown()


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_memory_stated_is_what_is_copied_and_gathered(
    start: Start, losses: Losses, zero_stage: int
) -> None:
    strategy = start(zero_stage)
    losses(strategy)
    whole = 3 * 4 * sum(each.numel() for each in strategy._chunks[0].parameters())  # fp32, two moments
    stated = whole if zero_stage == 0 else 4 / 3 * whole + 2 * whole
    assert strategy.snapshot_bytes() == pytest.approx(stated, rel=0.02)
    strategy.teardown()
