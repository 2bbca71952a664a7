from __future__ import annotations

import json

import pytest

from benchmarks import record
from benchmarks.slow_node import CUT, _outcome, summary


def test_a_case_counts_where_the_slow_host_is_named_alone() -> None:
    rows = [
        {"mbit_per_s": 400, "slow": "b", "gb_per_s": 0.049, "failed": ["b"]},
        {"mbit_per_s": 800, "slow": "b", "gb_per_s": 0.1, "failed": ["a", "b"]},
        {"mbit_per_s": CUT, "slow": "b", "gb_per_s": None, "failed": ["b"]},
    ]
    found = summary(rows, num_hosts=3)
    assert (found["cases"], found["named_alone"]) == (3, 2)
    assert found["largest_error"] == pytest.approx(0.02)
    assert summary([], num_hosts=3)["largest_error"] is None


def test_the_best_exchange_of_the_slow_host_is_its_rate() -> None:
    met = [
        {"a": 0, "b": 1, "gb_per_s": 0.1},
        {"a": 1, "b": 2, "gb_per_s": None},
        {"a": 0, "b": 2, "gb_per_s": 9.0},
    ]
    assert _outcome({"measured": {"exchanges": met}, "failed": ["x"]}, 1) == {
        "gb_per_s": 0.1,
        "failed": ["x"],
    }


def test_the_record_that_is_kept_names_every_slow_node() -> None:
    kept = sorted(record.RECORDS.glob("*-slow_node.json"))
    assert kept
    figures = json.loads(kept[-1].read_text(encoding="utf-8"))["figures"]
    assert figures["named_alone"] == figures["cases"] >= 4
    assert figures["largest_error"] < 0.2
