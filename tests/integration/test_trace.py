"""A traced run of two real ranks: a window for a viewer, single steps, groups by name, a page that shows them."""

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
    outcome = shell("train", *words, "monitor.profile=[5,7]", "monitor.trace_interval=4", f"run_dir={run}")
    assert outcome.code == 0, outcome.err
    assert "profiler_start" not in outcome.out + outcome.err, "Kineto tells the terminal of every trace"
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
        assert {name for name in rank["by operation"] if "all_reduce" in name} == {"dp: gloo:all_reduce"}
    records = [json.loads(line) for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record.get("traced")] == [4, 5, 6, 7, 8]
    assert [record["step"] for record in records if "tokens_per_s_per_gpu" in record] == [1, 2, 3]
    figures = {record["step"]: record for record in records if "communication_s" in record}
    assert list(figures) == [4, 7, 8]
    mean = sum(rank["by group"]["dp"] for rank in summary["ranks"]) / 2
    assert figures[7]["communication_s"] == {"dp": pytest.approx(mean)}
    for traced in figures.values():
        assert list(traced["communication_s"]) == ["dp"]
        assert (
            0 < traced["exposed_communication_s"] <= traced["communication_s"]["dp"] < traced["step_time_s"]
        )
    assert shell("report", str(run)).code == 0
    page = (run / "report.html").read_text()
    assert "from the profiler&#x27;s traces" in page.replace("'", "&#x27;")
    assert "seconds of a step over all traces of the run" in page
