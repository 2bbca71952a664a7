"""Predicted against measured on this CPU, by rank correlation: data parallel plans of three small shapes.

Every one that Accelerate and DeepSpeed have for two and four processes.
Run: python -m benchmarks.cpu_plans --record
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks import plan_runs, record
from benchmarks.plan_runs import Case, Effort, Shape
from launcher import compose
from launcher.cluster.spec import ClusterSpec
from launcher.decode import encode
from launcher.verbs import probe

BAR = 0.8
STRATEGIES = ("accelerate", "deepspeed")
WORLD_SIZES = (2, 4)
_BATCH = ("training.global_batch_size=8", "training.num_steps=8", "training.warmup_steps=1")
# Of debug_tiny's class: wide, where products count; deep and narrow, where launches and collectives do; long, where
# attention and its memory do.
SHAPES = {
    "wide": ("model.hidden_size=384", "model.ffn_hidden_size=1024", "training.sequence_length=64"),
    "deep": (
        "model.num_layers=6",
        "model.hidden_size=96",
        "model.ffn_hidden_size=256",
        "training.sequence_length=64",
    ),
    "long": ("training.sequence_length=256",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan, predicted and measured."""

    case: Case
    predicted_s: float
    measured_s: float


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    effort = Effort(num_steps=options.num_steps, warmup=options.warmup)
    shapes = {name: shape_of(words) for name, words in SHAPES.items()}
    sides = [Side(world_size=size, cases=cases(shapes, world_size=size)) for size in WORLD_SIZES]
    for index in range(options.rounds):
        for side in sides:
            side.measure(shapes, effort=effort, backwards=index % 2 == 1)
    rows = [row for side in sides for row in side.rows(shapes)]
    figures = {
        **summary(rows),
        "bar": BAR,
        "plans": len(rows),
        # As probed, without the host's name.
        "clusters": [encode(replace(side.cluster, measured=None)) for side in sides],
        "rows": [_plain(row) for row in rows],
    }
    print(json.dumps({key: figures[key] for key in figures if key not in ("clusters", "rows")}, indent=2))
    if options.record:
        done = record.create("cpu_plans", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='cpu_plans').name}")


def shape_of(words: Sequence[str]) -> Shape:
    """Compose a shape from the launcher's words."""
    [job] = compose.jobs([*words, *_BATCH])
    return Shape(model=job.model, training=job.training)


def probed(world_size: int) -> ClusterSpec:
    """Measure this machine with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        found = probe.run([f"out={folder}/cpu.yaml", f"num_processes={world_size}", "cluster.gpu.device=cpu"])
    assert found is not None, "not under torchrun"
    return found.cluster


def cases(shapes: dict[str, Shape], *, world_size: int) -> list[Case]:
    """Every plan of every shape and engine."""
    return [
        case
        for name, shape in shapes.items()
        for strategy in STRATEGIES
        for case in plan_runs.legal(shape, name=name, strategy=strategy, world_size=world_size)
    ]


@dataclass(kw_only=True)
class Side:
    """All plans of one world size, and what every round found. Others may use the machine: the best round counts."""

    world_size: int
    cases: list[Case]
    clusters: list[ClusterSpec] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)  # median step of each case

    def measure(self, shapes: dict[str, Shape], *, effort: Effort, backwards: bool) -> None:
        """Probe the machine and run every plan once; every other round backwards, so that a drift favours none."""
        self.clusters.append(probed(self.world_size))
        wanted = self.cases[::-1] if backwards else self.cases
        found = plan_runs.run(shapes, wanted, effort=effort, device="cpu", timeout_s=3600)
        seconds = [each.median_s for each in found]
        self.rounds.append(seconds[::-1] if backwards else seconds)

    @property
    def cluster(self) -> ClusterSpec:
        """The least disturbed probe."""
        return max(self.clusters, key=lambda cluster: cluster.gpu.peak_tflops["fp32"])

    def rows(self, shapes: dict[str, Shape]) -> list[Row]:
        """Predict every plan, beside the least disturbed of its rounds."""
        return [
            Row(
                case=case,
                predicted_s=plan_runs.predict(shapes[case.shape], case.plan, self.cluster).step_s,
                measured_s=min(seconds),
            )
            for case, seconds in zip(self.cases, zip(*self.rounds, strict=True), strict=True)
        ]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Rank correlation over all plans, and within each shape, world size and engine."""
    groups: dict[str, Callable[[Row], str]] = {
        "by_shape": lambda row: row.case.shape,
        "by_world_size": lambda row: str(row.case.plan.dp),
        "by_strategy": lambda row: row.case.plan.strategy,
        "by_shape_and_world_size": lambda row: f"{row.case.shape}-{row.case.plan.dp}",
    }
    found: dict[str, Any] = {"spearman": correlation(rows)}
    for name, key in groups.items():
        found[name] = {
            value: correlation([row for row in rows if key(row) == value])
            for value in sorted({key(row) for row in rows})
        }
    ratios = sorted(row.predicted_s / row.measured_s for row in rows)
    found["predicted_over_measured"] = {
        "min": ratios[0],
        "median": ratios[len(ratios) // 2],
        "max": ratios[-1],
    }
    return found


def correlation(rows: Sequence[Row]) -> float:
    """Spearman's rank correlation of predicted and measured step time."""
    return round(spearman([row.predicted_s for row in rows], [row.measured_s for row in rows]), 4)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, ties sharing theirs."""
    first, second = _ranks(left), _ranks(right)
    mean = (len(first) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    return covariance / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _plain(row: Row) -> dict[str, Any]:
    plan = row.case.plan
    return {
        "shape": row.case.shape,
        "plan": f"{plan.strategy} dp={plan.dp} zero_stage={plan.zero_stage} micro_batch_size={plan.micro_batch_size} "
        f"num_microbatches={plan.num_microbatches} recompute={plan.recompute}",
        "predicted_s": float(f"{row.predicted_s:.4g}"),
        "measured_s": float(f"{row.measured_s:.4g}"),
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_plans", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
