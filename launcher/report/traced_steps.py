"""Traced steps beside the plan's word for the same parts: those of a window as a table, single ones as curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from launcher.planner.cost import TimeCost
from launcher.planner.words.tables import seconds_text
from launcher.report.markup import table, tag
from launcher.report.run_data import RunData
from launcher.report.step_curves import Curve, chart

_EXPOSED, _GROUPS = "exposed_communication_s", "communication_s"


def traced_steps(runs: Sequence[RunData]) -> str:
    """Return what traces say of the runs; nothing where none was taken."""
    return _charts(runs) + "".join(_over_the_run(run) + _window(run) for run in runs)


def _charts(runs: Sequence[RunData]) -> str:
    planned = _parts(runs[0].cost().time) if len(runs) == 1 else {}
    line = " (line: the plan)" if planned else ""
    charts = [
        chart(
            [curve for run in runs for curve in run.curve(key)],
            name=key.split("_")[0],
            title=f"{title} in traced steps{line}",
            unit="s",
            limit=planned.get(part),
        )
        for key, part, title in (
            (_EXPOSED, "exposed communication", "Exposed communication"),
            ("idle_s", "idle", "Idle"),
        )
    ]
    groups = sorted({group for run in runs for record in run.records for group in record.get(_GROUPS, ())})
    for number, group in enumerate(groups):
        curves = [_of_group(run, group) for run in runs]
        charts.append(
            chart(curves, name=f"group{number}", title=f"Communication of {group}, hidden as well", unit="s")
        )
    return tag("div", *charts, class_="charts") if any(charts) else ""


def _of_group(run: RunData, group: str) -> Curve:
    traced = (record for record in run.records if group in record.get(_GROUPS, ()))
    points = tuple((record["step"], record[_GROUPS][group]) for record in traced)
    return Curve(name=run.name, run=run.number, points=points)


def _parts(time: TimeCost) -> dict[str, float]:
    """The plan's seconds by what a trace can tell apart."""
    return {
        "compute": time.compute + time.recompute + time.optimizer,
        "exposed communication": time.tp + time.cp + time.ep + time.pp + time.dp,
        "idle": time.bubble + time.offload,
    }


def _over_the_run(run: RunData) -> str:
    """Single steps: each figure's median over the run, beside the plan's."""
    found: dict[str, list[float]] = {}
    for record in run.records:
        found.setdefault("exposed communication", []).extend(_number(record, _EXPOSED))
        found.setdefault("idle", []).extend(_number(record, "idle_s"))
        for group, seconds in record.get(_GROUPS, {}).items():
            found.setdefault(f"communication of {group}", []).append(seconds)
    planned = _parts(run.cost().time)
    rows = [
        (
            part,
            seconds_text(planned[part]) if part in planned else "-",
            seconds_text(statistics.median(values)),
            seconds_text(max(values)),
            str(len(values)),
        )
        for part, values in found.items()
        if values
    ]
    if not rows:
        return ""
    return table(
        ("part", "predicted", "median", "largest", "traces"),
        rows,
        caption=f"{run.name}: seconds of a step over all traces of the run. Waiting for another rank is communication; "
        "that of a group counts what computing hides as well",
        words=(0,),
    )


def _number(record: Mapping[str, float], key: str) -> list[float]:
    return [record[key]] if key in record else []


def _window(run: RunData) -> str:
    """The profiled steps of `monitor.profile`, rank by rank."""
    if run.trace is None:
        return ""
    planned = _parts(run.cost().time)
    rows = []
    for part in ("compute", "communication", "exposed communication", "idle"):
        values = [rank[part] for rank in run.trace["ranks"]]
        predicted = seconds_text(planned[part]) if part in planned else "-"
        rows.append((part, predicted, seconds_text(statistics.fmean(values)), seconds_text(max(values))))
    steps = f"steps {run.trace['first_step']} to {run.trace['last_step']}"
    return table(
        ("part", "predicted", "mean of the ranks", "largest"),
        rows,
        caption=f"{run.name}: seconds of a step in {steps}, from the profiler's traces",
    )
