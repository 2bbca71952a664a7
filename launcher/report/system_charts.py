"""What nodes and GPUs did over a run, as charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from launcher.report.markup import tag
from launcher.report.run_data import RunData
from launcher.report.step_curves import Curve, chart

_GAUGES = (
    ("cpu_percent", "Load of all cores", "%"),
    ("host_memory_gib", "Host memory in use", "GiB"),
    ("gpu_percent", "GPU busy", "%"),
    ("gpu_power_w", "GPU power", "W"),
    ("gpu_temperature_celsius", "GPU temperature", "degrees"),
    ("gpu_clock_mhz", "GPU clock", "MHz"),
)
_COUNTERS = (
    ("network_sent_bytes", "Network, sent", "bytes/s"),
    ("network_received_bytes", "Network, received", "bytes/s"),
    ("disk_read_bytes", "Disk, read", "bytes/s"),
    ("disk_written_bytes", "Disk, written", "bytes/s"),
    ("gpu_nvlink_bytes", "NVLink, both directions", "bytes/s"),
)


def system_charts(runs: Sequence[RunData]) -> str:
    """Draw one chart a metric that any of the runs has; traffic as a rate."""
    charts = [
        chart([c for run in runs for c in run.curve(key)], name=key.replace("_", ""), title=title, unit=unit)
        for key, title, unit in _GAUGES
    ]
    for key, title, unit in _COUNTERS:
        rates = [_rate(c, run) for run in runs for c in run.curve(key)]
        if any(y for rate in rates for _, y in rate.points):
            charts.append(chart(rates, name=key.replace("_", ""), title=title, unit=unit))
    return tag("div", *charts, class_="charts") if any(charts) else ""


def _rate(curve: Curve, run: RunData) -> Curve:
    """Turn a growing count into bytes a second; a restart begins it anew."""
    times = {record["step"]: record["time"] for record in run.records}
    points = tuple(
        (step, (now - before) / (times[step] - times[last]))
        for (last, before), (step, now) in pairwise(curve.points)
        if now >= before and times[step] > times[last]
    )
    return replace(curve, points=points)
