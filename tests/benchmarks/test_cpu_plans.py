"""Rank correlation, and how rows are summed up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import cpu_plans, plan_runs
from benchmarks.cpu_plans import SHAPES, Row, Side, shape_of, spearman, summary
from benchmarks.plan_runs import Case, Effort, Measured
from launcher import compose
from launcher.cluster.spec import ClusterSpec
from strategies.spec import Plan


def row(shape: str, predicted_s: float, measured_s: float, *, dp: int = 2) -> Row:
    plan = Plan(strategy="fake", dp=dp)
    return Row(case=Case(shape=shape, plan=plan), predicted_s=predicted_s, measured_s=measured_s)


def test_spearman_knows_order_and_nothing_else() -> None:
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    # Ties share their rank: scipy.stats.spearmanr says the same.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_groups_are_correlated_apart() -> None:
    rows = [
        row("a", 1, 1),
        row("a", 2, 2),
        row("a", 3, 3, dp=4),
        row("b", 1, 9),
        row("b", 2, 8, dp=4),
        row("b", 3, 7),
    ]
    found = summary(rows)
    assert found["by_shape"] == {"a": 1.0, "b": -1.0}
    assert set(found["by_world_size"]) == {"2", "4"}
    assert found["predicted_over_measured"]["max"] == 1.0


def test_shapes_compose_and_differ() -> None:
    shapes = {name: shape_of(words) for name, words in SHAPES.items()}
    flops = {
        name: shape.model.flops_per_token(shape.training.sequence_length) for name, shape in shapes.items()
    }
    assert flops["wide"] > 2 * flops["deep"]
    assert shapes["deep"].model.num_layers > 2 * shapes["wide"].model.num_layers
    assert all(shape.training.global_batch_size % 4 == 0 for shape in shapes.values())


def test_the_least_disturbed_round_and_probe_count(monkeypatch: pytest.MonkeyPatch) -> None:
    [job] = compose.jobs(["cluster.gpu.device=cpu"])
    peaks, order = iter([0.1, 0.3, 0.2]), []

    def probed(world_size: int) -> ClusterSpec:
        return replace(job.cluster, gpu=replace(job.cluster.gpu, peak_tflops={"fp32": next(peaks)}))

    def run(shapes: Any, wanted: list[Case], **_: Any) -> list[Measured]:
        order.append([case.shape for case in wanted])
        return [Measured(step_s=(float(len(order)) + (case.shape == "b"),), peak_bytes=0) for case in wanted]

    monkeypatch.setattr(cpu_plans, "probed", probed)
    monkeypatch.setattr(plan_runs, "run", run)
    side = Side(world_size=2, cases=[row(name, 1, 1).case for name in ("a", "b")])
    for backwards in (False, True, False):
        side.measure({}, effort=Effort(num_steps=1, warmup=0), backwards=backwards)
    assert order == [["a", "b"], ["b", "a"], ["a", "b"]]
    assert side.cluster.gpu.peak_tflops == {"fp32": 0.3}
    assert [min(seconds) for seconds in zip(*side.rounds, strict=True)] == [1.0, 2.0]
