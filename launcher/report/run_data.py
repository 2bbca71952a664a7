"""What a run directory holds for its page, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.config import Job
from launcher.monitor.alerts import Outbox
from launcher.monitor.metrics import read
from launcher.planner.cost import CostBreakdown, MemoryCost, TimeCost
from launcher.report.history import Span, spans_of
from launcher.report.step_curves import Curve
from launcher.run_dir import RunDir, since_replanned, state
from strategies.spec import Plan


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run as it stands. `number` is its place among the runs of a page, which decides its colour."""

    number: int
    name: str
    job: Job
    plan: Plan
    predictions: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    alerts: Sequence[Mapping[str, Any]]
    env: Mapping[str, Any]
    trace: Mapping[str, Any] | None  # summary of the profiled steps, if there were any

    @property
    def state(self) -> str:
        """The word for where the run stands."""
        return state([dict(event) for event in self.events])

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where the time went."""
        return spans_of(self.events, self.records)

    @property
    def measured(self) -> Mapping[str, Any]:
        """What the steps under the present plan measured; empty before warm-up is over."""
        events = since_replanned([dict(event) for event in self.events])
        return next((event["measured"] for event in reversed(events) if "measured" in event), {})

    def newest(self, key: str) -> Any:
        """Return the last value of a metric, or None."""
        return next((record[key] for record in reversed(self.records) if key in record), None)

    def curve(self, key: str, *, label: str = "", dash: int = 0) -> list[Curve]:
        """Return a metric over the steps; one with labels gives a curve for each of them."""
        found: dict[str, list[tuple[float, float]]] = {}
        for record in self.records:
            value = record.get(key)
            if isinstance(value, Mapping):
                for where, number in value.items():
                    found.setdefault(str(where), []).append((record["step"], number))
            elif value is not None:
                found.setdefault("", []).append((record["step"], value))
        return [
            Curve(
                name=" ".join(word for word in (self.name, label, where) if word),
                run=self.number,
                points=tuple(points),
                dash=dash + index,
                label=where or label,
            )
            for index, (where, points) in enumerate(found.items())
        ]

    def cost(self) -> CostBreakdown:
        """Return the prediction as the planner made it."""
        told = self.predictions
        return CostBreakdown(
            memory=MemoryCost(**told["memory_bytes_by_part"]),
            host_bytes=told["host_bytes"],
            disk_bytes=told["disk_bytes"],
            stage=told["memory_stage"],
            time=TimeCost(**told["step_s_by_part"]),
            tokens_per_step=self.job.training.tokens_per_step,
            num_gpus=self.plan.world_size,
            model_flops_per_step=told["model_flops_per_step"],
            peak_flops=told["peak_flops"],
        )


def load(run: RunDir, *, number: int) -> RunData:
    """Read a run directory; raise RunDirError where it is damaged."""
    return RunData(
        number=number,
        name=run.path.name,
        job=run.job(),
        plan=run.plan(),
        predictions=run.plan_data()["predictions"],
        records=read(run.metrics_file),
        events=list(run.events()),
        alerts=Outbox(run.metrics, repeat_s=0).told(),
        env=run.env(),
        trace=run.trace(),
    )


def load_all(runs: Sequence[RunDir]) -> list[RunData]:
    """Read several; folders of one name are called by as much of their path as tells them apart."""
    names, depth = [run.path.name for run in runs], 1
    while len(set(names)) < len({run.path for run in runs}):
        depth += 1
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
    loaded = [load(run, number=number) for number, run in enumerate(runs)]
    return [replace(run, name=name) for run, name in zip(loaded, names, strict=True)]
