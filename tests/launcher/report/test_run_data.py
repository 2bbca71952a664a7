"""A run directory as its page needs it."""

from __future__ import annotations

from launcher.report.run_data import load
from launcher.run_dir import RunDir


def test_a_run_is_read_as_it_lies(finished_run: RunDir) -> None:
    run = load(finished_run, number=3)
    assert (run.name, run.number) == ("first", 3)
    assert [record["step"] for record in run.records] == list(range(1, 25))
    assert run.newest("step") == 24
    assert run.newest("restarts") == 1
    assert run.newest("no such thing") is None
    assert run.measured["step_s"] > 0
    assert run.alerts == []
    assert run.trace is None


def test_the_frozen_prediction_is_the_cost(finished_run: RunDir) -> None:
    run = load(finished_run, number=0)
    cost = run.cost()
    assert cost.step_s == run.predictions["step_s"]
    assert cost.tokens_per_s_per_gpu == run.predictions["tokens_per_s_per_gpu"]


def test_curves_have_points_where_metrics_have_values(finished_run: RunDir) -> None:
    run = load(finished_run, number=0)
    (loss,) = run.curve("loss")
    assert [x for x, _ in loss.points] == list(range(1, 25))
    (node,) = run.curve("host_memory_gib", label="memory")
    assert node.name.startswith("first memory ")
    assert node.label == node.name.removeprefix("first memory ")
    assert [x for x, _ in node.points] == [1, 4, 8, 12, 16, 20, 24]
    assert run.curve("gpu_percent") == []
