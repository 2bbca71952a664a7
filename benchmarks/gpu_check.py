"""Predicted against measured on one GPU: peak memory and step time of twelve and more configurations.

Run: python -m benchmarks.gpu_check --record
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import plan_runs, record
from benchmarks.plan_runs import Case, Effort, Measured, Shape
from launcher import compose
from launcher.cluster.spec import ClusterSpec
from launcher.errors import PlanError
from strategies.spec import Plan, Precision, Recompute

# Name -> the launcher's words. Sizes from launch-bound to a tenth of a large GPU's memory.
MODELS = {
    "gpt2": ("model=gpt2_124m", "training.sequence_length=1024"),
    "qwen3": ("model=qwen3_0.6b", "training.sequence_length=2048"),
    "llama_1b": (
        "model=llama3_8b",
        "model.num_layers=12",
        "model.hidden_size=2048",
        "model.num_attention_heads=16",
        "model.ffn_hidden_size=7168",
        "training.sequence_length=4096",
    ),
}
MICRO_BATCH_SIZES = {"gpt2": (2, 16), "qwen3": (1, 8), "llama_1b": (1, 4)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration; `skipped`: why the planner refused it here."""

    name: str
    predicted_s: float = 0.0
    measured_s: float = 0.0
    predicted_bytes: float = 0.0
    measured_bytes: int = 0
    skipped: str | None = None


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    words = [f"cluster={options.cluster}", f"cluster.gpu.device={options.device}", "cluster.gpus_per_node=1"]
    shapes, cluster = {}, None
    for name, model in MODELS.items():
        [job] = compose.jobs([*words, *model, "training.global_batch_size=16"])
        shapes[name], cluster = Shape(model=job.model, training=job.training), job.cluster
    assert cluster is not None, "there are models"
    effort = Effort(num_steps=options.num_steps, warmup=2)
    rows = check(shapes, list(cases(shapes)), cluster, effort=effort)
    figures = {**summary(rows), "rows": [_plain(row) for row in rows]}
    print(json.dumps(figures, indent=2))
    if options.record:
        done = record.create("gpu_check", arguments=arguments, figures=figures)
        print(f"recorded {record.write(done, name='gpu_check').name}")


def cases(shapes: dict[str, Shape]) -> list[Case]:
    """Every model in two micro-batches, recomputed or not, in bf16; the small ones in fp32 too."""
    found = []
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    kinds: tuple[Recompute, ...] = ("none", "full")
    for name in shapes:
        for size in MICRO_BATCH_SIZES[name]:
            for precision in precisions[: 1 if name == "llama_1b" else 2]:
                for recompute in kinds:
                    plan = Plan(
                        strategy="accelerate",
                        dp=1,
                        micro_batch_size=size,
                        num_microbatches=shapes[name].training.global_batch_size // size,
                        recompute=recompute,
                        precision=precision,
                    )
                    found.append(Case(shape=name, plan=plan))
    return found


def check(
    shapes: dict[str, Shape], wanted: Sequence[Case], cluster: ClusterSpec, *, effort: Effort
) -> list[Row]:
    """Predict and run what fits; one process for all of them."""
    rows, fitting = [], []
    for case in wanted:
        name = f"{case.shape} mbs={case.plan.micro_batch_size} {case.plan.precision} {case.plan.recompute}"
        try:
            cost = plan_runs.predict(shapes[case.shape], case.plan, cluster)
        except PlanError as error:
            rows.append(Row(name=name, skipped=str(error)))
            continue
        fitting.append(case)
        rows.append(Row(name=name, predicted_s=cost.step_s, predicted_bytes=cost.memory.total))
    measured = iter(
        plan_runs.run(shapes, fitting, effort=effort, device=cluster.gpu.device, timeout_s=580)
        if fitting
        else []
    )
    return [row if row.skipped else _with(row, next(measured)) for row in rows]


def _with(row: Row, found: Measured) -> Row:
    return replace(row, measured_s=found.median_s, measured_bytes=found.peak_bytes)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Ratios of predicted to measured; memory only where a device counts it."""
    ran = [row for row in rows if not row.skipped]
    found: dict[str, Any] = {"configurations": len(ran), "skipped": len(rows) - len(ran)}
    ratios = {
        "step_s": [row.predicted_s / row.measured_s for row in ran],
        "memory": [row.predicted_bytes / row.measured_bytes for row in ran if row.measured_bytes],
    }
    for name, values in ratios.items():
        if values:
            middle = {"min": min(values), "median": statistics.median(values), "max": max(values)}
            found[f"{name}_predicted_over_measured"] = middle
            found[f"{name}_median_error"] = statistics.median(abs(value - 1) for value in values)
    return found


def _plain(row: Row) -> dict[str, Any]:
    if row.skipped:
        return {"name": row.name, "skipped": row.skipped}
    return {
        "name": row.name,
        "predicted_s": float(f"{row.predicted_s:.4g}"),
        "measured_s": float(f"{row.measured_s:.4g}"),
        "predicted_gib": round(row.predicted_bytes / 2**30, 3),
        "measured_gib": round(row.measured_bytes / 2**30, 3),
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--cluster", default="local", help="a preset, or a file that `meshwright probe` wrote"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/records")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
