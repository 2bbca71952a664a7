"""A traced run of two real ranks: traces that a viewer reads, parts that make up the step, a page that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_profiled_steps_are_traced_on_every_rank(tmp_path: Path, shell: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    words = ["cluster.gpus_per_node=2", "model.num_layers=2", "training.sequence_length=32", "monitor=none"]
    words += ["training.global_batch_size=8", "training.num_steps=8", "data.max_bytes=200000"]
    outcome = shell("train", *words, "monitor.profile=[5,7]", f"run_dir={run}")
    assert outcome.code == 0, outcome.err
    assert "traced steps of" in outcome.out
    folder = run / "metrics" / "trace"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank_00000.json",
        "rank_00001.json",
        "summary.json",
    ]
    for path in folder.glob("rank_*.json"):
        events = json.loads(path.read_text())["traceEvents"]
        steps = sorted(e["name"] for e in events if str(e.get("name", "")).startswith("meshwright step"))
        assert steps == [f"meshwright step {number}" for number in (5, 6, 7)]
    summary = json.loads((folder / "summary.json").read_text())
    for rank in summary["ranks"]:
        assert rank["compute"] + rank["exposed communication"] + rank["idle"] == pytest.approx(rank["step"])
        assert 0 < rank["exposed communication"] <= rank["communication"] < rank["step"]
        assert any("all_reduce" in name for name in rank["by operation"])
    records = [json.loads(line) for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]
    (traced,) = [record for record in records if "communication_s" in record]
    assert traced["step"] == 7
    mean = sum(rank["by group"]["unnamed"] for rank in summary["ranks"]) / 2
    assert traced["communication_s"] == {"unnamed": pytest.approx(mean)}
    assert 0 < traced["exposed_communication_s"] < traced["step_time_s"]
    assert shell("report", str(run)).code == 0
    assert "from the profiler&#x27;s traces" in (run / "report.html").read_text().replace("'", "&#x27;")
