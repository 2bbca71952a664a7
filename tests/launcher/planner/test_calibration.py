"""Factors of a finished run on memory and time."""

from __future__ import annotations

from dataclasses import fields

import pytest

from launcher.planner.calibration import Calibration, scaled
from launcher.planner.cost import MemoryCost, TimeCost, parts


def test_the_sentence_says_how_much_from_where_and_when() -> None:
    found = Calibration(time=1.1234, memory=0.97, run="runs/a", date="2026-01-02", host="node7").sentence
    assert found == "scaled by 1.12 (time) and 0.97 (memory), measured in runs/a on 2026-01-02, node7"


def test_every_part_is_scaled() -> None:
    memory = MemoryCost(**{field.name: 10.0 * i for i, field in enumerate(fields(MemoryCost))})
    time = TimeCost(**{field.name: 10.0 * i for i, field in enumerate(fields(TimeCost))})
    assert parts(scaled(memory, 1.5)) == {key: 1.5 * value for key, value in parts(memory).items()}
    assert scaled(time, 0.5).total == pytest.approx(0.5 * time.total)


@pytest.mark.parametrize("key", ["time", "memory"])
def test_a_factor_is_above_zero(key: str) -> None:
    given = {"time": 1.0, "memory": 1.0, key: 0.0}
    with pytest.raises(ValueError, match=rf"calibration.{key}=0.0 must be above 0"):
        Calibration(run="a", date="b", host="c", **given)
