"""What traces say, beside the plan: a window rank by rank, single steps over the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from launcher.report.run_data import RunData, load
from launcher.report.run_page import run_page
from launcher.report.traced_steps import traced_steps
from launcher.run_dir import RunDir


@pytest.fixture
def run(finished_run: RunDir) -> RunData:
    return load(finished_run, number=0)


def with_traces(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every eighth step was traced: it sends a second more each time."""
    return [
        {
            **record,
            "traced": True,
            "communication_s": {"tp": record["step"] / 8, "dp": 0.5},
            "exposed_communication_s": 0.25,
            "idle_s": 0.0625,
        }
        if record["step"] % 8 == 0
        else dict(record)
        for record in records
    ]


def test_a_window_stands_beside_the_plan(run: RunData, reader: Any) -> None:
    parts = {"compute": 0.5, "communication": 0.2, "exposed communication": 0.1, "idle": 0.05}
    trace = {"first_step": 5, "last_step": 6, "ranks": [parts, {**parts, "compute": 0.7}]}
    words = reader(traced_steps([replace(run, trace=trace)])).words
    assert "seconds of a step in steps 5 to 6" in words
    assert "0.600" in words
    assert "0.700" in words


def test_single_steps_are_curves_and_medians_beside_the_plan(run: RunData, reader: Any) -> None:
    html = run_page([replace(run, records=with_traces(run.records))])
    seen = reader(html)
    assert len(set(seen.ids)) == len(seen.ids)
    assert {"exposed-title", "idle-title", "group0-title", "group1-title"} <= set(seen.ids)
    assert "Communication of dp, hidden as well, s" in seen.words
    assert "first ends at 0.5 s." in seen.words
    assert "first ends at 3 s." in seen.words
    assert "first ends at 0.25 s." in seen.words
    assert 'class="limit"' in html
    time = run.cost().time
    exposed = f"{time.tp + time.cp + time.ep + time.pp + time.dp:.4f}"
    assert f"exposed communication{exposed}0.2500.2503" in seen.words
    assert "communication of tp-2.0003.0003" in seen.words


def test_several_runs_share_the_charts_without_one_plans_line(run: RunData) -> None:
    records = with_traces(run.records)
    html = traced_steps([replace(run, records=records), replace(run, records=records, number=1, name="b")])
    assert 'class="curve hue1"' in html
    assert 'class="limit"' not in html
    assert "line: the plan" not in html


def test_without_traces_there_is_nothing(run: RunData) -> None:
    assert traced_steps([run]) == ""
