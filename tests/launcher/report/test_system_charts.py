"""Nodes and GPUs over a run: gauges as they are, counts as rates."""

from __future__ import annotations

from dataclasses import replace

from launcher.report.run_data import RunData, load
from launcher.report.system_charts import _rate, system_charts
from launcher.run_dir import RunDir


def run_with(finished_run: RunDir, **figures: list[float]) -> RunData:
    """The run with other records: each figure of node `n` at steps 1, 2, ..., ten seconds apart."""
    count = len(next(iter(figures.values())))
    records = [
        {"step": i + 1, "time": 10.0 * i, **{key: {"n": values[i]} for key, values in figures.items()}}
        for i in range(count)
    ]
    return replace(load(finished_run, number=0), records=records)


def test_counts_become_rates_and_a_restart_begins_anew(finished_run: RunDir) -> None:
    run = run_with(finished_run, network_sent_bytes=[0.0, 50.0, 150.0, 20.0, 40.0])
    (curve,) = run.curve("network_sent_bytes")
    assert _rate(curve, run).points == ((2, 5.0), (3, 10.0), (5, 2.0))


def test_only_what_was_measured_is_drawn(finished_run: RunDir) -> None:
    run = run_with(finished_run, gpu_power_w=[300.0, 310.0], disk_read_bytes=[0.0, 0.0])
    html = system_charts([run])
    assert "GPU power, W" in html
    assert html.count("<svg") == 1
    assert system_charts([replace(run, records=[])]) == ""
