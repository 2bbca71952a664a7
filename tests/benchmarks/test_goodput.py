from __future__ import annotations

import statistics

import pytest

from benchmarks.goodput import draws


def test_times_between_failures_have_the_mean_and_the_spread_of_the_exponential() -> None:
    few, many = draws(6, mean=200.0, seed=1), draws(1000, mean=200.0, seed=1)
    assert statistics.fmean(few) == pytest.approx(200)
    assert statistics.pstdev(many) == pytest.approx(200, rel=0.02)
    assert few != sorted(few)
    assert few == draws(6, mean=200.0, seed=1) != draws(6, mean=200.0, seed=2)
