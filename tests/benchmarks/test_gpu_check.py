"""The GPU benchmark's code path, on this CPU with two tiny configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import MODELS, Row, cases, check, summary
from benchmarks.plan_runs import Case, Effort, Shape
from launcher import compose
from strategies.spec import Plan

WORDS = (
    *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.num_kv_heads=2"),
    *("model.ffn_hidden_size=32", "training.sequence_length=8", "training.global_batch_size=2"),
    *("cluster.gpu.device=cpu", "cluster.gpus_per_node=1"),
)


def test_at_least_twelve_configurations_fill_the_batch() -> None:
    shapes = {}
    for name, words in MODELS.items():
        [job] = compose.jobs(["cluster=h200_sxm", *words, "training.global_batch_size=16"])
        shapes[name] = Shape(model=job.model, training=job.training)
    found = cases(shapes)
    assert len(found) >= 12
    assert {case.plan.recompute for case in found} == {"none", "full"}
    assert {case.plan.precision for case in found} == {"bf16", "fp32"}
    assert {case.plan.global_batch_size for case in found} == {16}


def test_what_fits_is_run_and_what_does_not_is_said() -> None:
    [job] = compose.jobs(WORDS)
    shapes = {"x": Shape(model=job.model, training=job.training)}
    plan = Plan(strategy="accelerate", dp=1, micro_batch_size=2, precision="fp32")
    wanted = [Case(shape="x", plan=plan), Case(shape="x", plan=replace(plan, recompute="full"))]
    effort = Effort(num_steps=2, warmup=1)
    rows = check(shapes, wanted, job.cluster, effort=effort)
    assert [row.name for row in rows] == ["x mbs=2 fp32 none", "x mbs=2 fp32 full"]
    assert all(row.predicted_s > 0 and row.measured_s > 0 and row.skipped is None for row in rows)
    # Nothing of this kind fits a device without memory, and then nothing is started.
    full = replace(job.cluster, gpu=replace(job.cluster.gpu, memory_gib=0.0001), reserved_gib=0.0)
    refused = check(shapes, wanted, full, effort=effort)
    assert all(row.skipped and "fits" in row.skipped for row in refused)
    assert summary([*rows, *refused])["skipped"] == 2


def test_memory_is_compared_only_where_it_was_counted() -> None:
    ran = Row(name="a", predicted_s=2.0, measured_s=1.0, predicted_bytes=90, measured_bytes=100)
    found = summary([ran, replace(ran, predicted_s=1.0), Row(name="b", skipped="too large")])
    assert found["step_s_predicted_over_measured"] == {"min": 1.0, "median": 1.5, "max": 2.0}
    assert found["memory_median_error"] == pytest.approx(0.1)
    assert "memory_median_error" not in summary([replace(ran, measured_bytes=0)])


def test_the_command_reads_its_options() -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "tpu"])
