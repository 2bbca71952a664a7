"""Saving and loading on one rank; other degrees are in tests/integration/test_parity_megatron.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from strategies.megatron import MegatronStrategy

# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
Start, Losses = Callable[..., MegatronStrategy], Callable[..., list[float]]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_what_was_saved_goes_on_to_the_last_bit(
    start: Start, losses: Losses, tmp_path: Path, zero_stage: int
) -> None:
    strategy = start(zero_stage)
    losses(strategy, 2)
    strategy.save(tmp_path)
    unbroken = losses(strategy, 2)  # saving changes nothing, and training goes on
    strategy.teardown()
    resumed = start(zero_stage)
    resumed.load(tmp_path)
    assert losses(resumed, 2) == unbroken
    resumed.teardown()
