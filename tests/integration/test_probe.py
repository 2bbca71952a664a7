"""`meshwright probe` for real: two processes on this machine, and a plan with what they found."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def test_two_processes_measure_this_machine(shell: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    started = time.monotonic()
    outcome = shell(
        "probe", f"out={path}", "num_processes=2", "cluster.gpu.device=cpu", "seconds=60", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert time.monotonic() - started < 150
    figures = outcome.json["figures"]
    assert {row["name"] for row in figures["collectives"]} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "exchange",
    }
    assert figures["host"]["sharded_s"] > figures["host"]["whole_s"] > 0
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert cluster["measured"]["host"] and cluster["gpu"]["efficiency"]["source"] == "meshwright probe"
    assert cluster["links"][0]["gb_per_s"] > 0
    plan = shell("plan", f"cluster={path}", "strategy=accelerate", "--json")
    assert plan.code == 0, plan.err
    assert plan.json["predictions"]["mfu"] is not None, "a measured peak is no guess"
