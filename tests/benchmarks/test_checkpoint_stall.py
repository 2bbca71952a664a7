from __future__ import annotations

import json

import pytest

from benchmarks import record
from benchmarks.checkpoint_stall import BAR, summary
from benchmarks.record import RECORDS
from launcher.decode import decode


def of(waited: float, stall: float) -> dict[str, float]:
    return {"waited_s": waited, "stall_s": stall, "step_s": 1.0, "step_beside_s": 1.5, "num_steps_beside": 3}


def test_saves_are_compared_within_their_round_and_the_first_stands_apart() -> None:
    found = summary([of(10, 5), of(10, 0.5), of(20, 1), of(10, 1)], state_gib=1.1)
    assert found["ratio_first"] == 0.5
    assert found["ratio"] == {"median": 0.05, "min": 0.05, "max": 0.1}
    assert found["step_beside_a_save_over_step_alone"] == 1.5


@pytest.mark.parametrize(
    "path", sorted(RECORDS.glob("*-checkpoint_stall-*.json")), ids=lambda path: path.name
)
def test_records_hold_what_they_sum_up(path) -> None:
    figures = decode(record.Record, json.loads(path.read_text(encoding="utf-8"))).figures
    again = summary(figures["rounds"], state_gib=figures["state_gib"])
    assert {key: figures[key] for key in again} == again
    assert figures["state_gib"] >= 1 and figures["bar"] == BAR
