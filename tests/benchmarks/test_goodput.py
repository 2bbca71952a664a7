from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.goodput import BAR, draws
from launcher.decode import decode
from launcher.training.interval import expected_goodput


def test_times_between_failures_have_the_mean_and_the_spread_of_the_exponential() -> None:
    few, many = draws(6, mean=200.0, seed=1), draws(1000, mean=200.0, seed=1)
    assert statistics.fmean(few) == pytest.approx(200)
    assert statistics.pstdev(many) == pytest.approx(200, rel=0.02)
    assert few != sorted(few)
    assert few == draws(6, mean=200.0, seed=1) != draws(6, mean=200.0, seed=2)


@pytest.mark.parametrize("path", sorted(record.RECORDS.glob("*-goodput.json")), ids=lambda path: path.name)
def test_records_were_predicted_by_the_formula_and_hold_the_bar(path: Path) -> None:
    figures = decode(record.Record, json.loads(path.read_text(encoding="utf-8"))).figures
    predicted = expected_goodput(
        interval_s=figures["interval_steps"] * figures["step_s"],
        **{key: figures[key] for key in ("save_s", "restart_s", "mttf_s")},
    )
    assert figures["predicted"] == pytest.approx(predicted)
    assert figures["mttf_s"] == pytest.approx(20 * figures["interval_steps"] * figures["step_s"])
    assert abs(figures["goodput"] - figures["predicted"]) <= figures["bar"] == BAR
