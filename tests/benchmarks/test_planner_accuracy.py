"""Predictions set against published rows: one object a row whatever it holds, and figures checked by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planner_accuracy import (
    Evaluated,
    evaluate,
    evaluate_line,
    kendall,
    ranking_of,
    regret,
    summary_of,
    to_row,
)

TARGET = {"full_step_time_target": True, "shape_known": True, "config_complete": True}
ROW: dict[str, Any] = {
    "id": "mill-0001",
    "task": "pretrain",
    "gpu": "A100-SXM4-80GB",
    "gpus_per_node": 8,
    "num_gpus": 8,
    "model": {
        "name": "toy-1b",
        "layers": 8,
        "hidden": 2048,
        "heads": 16,
        "ffn": 5632,
        "vocab": 32000,
        "gated_mlp": True,
        "tied_embeddings": False,
        "seq_len": 2048,
    },
    "framework": "Megatron-Core",
    "version": "2025",
    "tp": 1,
    "pp": 1,
    "cp": 1,
    "zero_stage": 1,
    "mbs": 1,
    "gbs": 64,
    "recompute": "none",
    "precision": "bf16",
    "oom": False,
    "usable": TARGET,
}
HUGE = {**ROW["model"], "name": "toy-900b", "layers": 120, "hidden": 24576, "heads": 192, "ffn": 98304}
MIXTURE = {**ROW["model"], "name": "toy-moe", "moe": {"experts": 16, "topk": 2, "ffn": 1024}}
REQUIRED = {"id", "predicted_step_time_s", "predicted_memory_gib", "fits", "reason"}


def row(**changes: Any) -> dict[str, Any]:
    return ROW | changes


def wrong_by(error: float, **changes: Any) -> Evaluated:
    """Return a row whose measured step is such that the prediction is off by `error`."""
    predicted = evaluate(row(**changes)).cost
    assert predicted
    return evaluate(row(**changes, step_time_s=predicted.step_s / (1 + error)))


def test_a_row_that_can_be_predicted() -> None:
    found = to_row(evaluate(row(step_time_s=2.0, memory_gib_peak=30)))
    assert set(found) >= REQUIRED
    assert (found["id"], found["fits"], found["reason"]) == ("mill-0001", True, None)
    assert 0.05 < found["predicted_step_time_s"] < 5
    assert 3 < found["predicted_memory_gib"] < 30
    assert found["step_time_error"] == pytest.approx(found["predicted_step_time_s"] / 2 - 1)
    assert found["memory_error"] == pytest.approx(found["predicted_memory_gib"] / 30 - 1)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"model": MIXTURE, "ep": 8}, True),
        ({"task": "lora"}, True),
        ({"precision": "fp16", "framework": "DeepSpeed", "zero_stage": 3}, True),
        ({"tp": 2, "pp": 2, "vp": 2, "sequence_parallel": True, "recompute": "full"}, True),
        ({"model": HUGE, "oom": True}, False),
    ],
)
def test_kinds_of_rows(changes: dict[str, Any], fits: bool) -> None:
    found = to_row(evaluate(row(**changes)))
    assert (found["fits"], found["reason"]) == (fits, None)
    assert found["predicted_step_time_s"] > 0
    assert found["step_time_error"] is found["measured_step_time_s"] is found["memory_error"] is None


def test_a_row_without_a_prediction_says_why() -> None:
    assert to_row(evaluate(row(mbs=None))) == {
        "id": "mill-0001",
        "predicted_step_time_s": None,
        "predicted_memory_gib": None,
        "fits": None,
        "reason": "the row lacks mbs",
        "measured_step_time_s": None,
        "step_time_error": None,
        "measured_memory_gib": None,
        "memory_error": None,
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "the line is not JSON: "),
        ("[1, 2]", "the row, or its model, is not an object with keys"),
        ("null", "the row, or its model, is not an object with keys"),
        ("{}", "the row lacks layers, hidden, heads, vocab, seq_len, num_gpus, mbs, gbs, gpu"),
        (json.dumps(row(model=7)), "the row, or its model, is not an object with keys"),
        (json.dumps(row(model={**ROW["model"], "head_dim": 0.1})), "the row cannot be "),
    ],
)
def test_bad_lines_do_not_raise(line: str, reason: str) -> None:
    found = evaluate_line(line)
    assert found.reason is not None
    assert found.reason.startswith(reason)
    assert set(to_row(found)) >= REQUIRED
    assert summary_of([found])["not_predicted"] == {found.reason: 1}


def test_the_summary_counts_rows_and_errors() -> None:
    errors = [-0.2, -0.1, 0.0, 0.1, 0.3, 0.4]
    rows = [wrong_by(error, id=f"mill-{index}") for index, error in enumerate(errors)]
    other = wrong_by(1.0, id="forge-1", model=MIXTURE, precision=None)
    untimed = evaluate(row(id="mill-8"))
    partial = wrong_by(5.0, id="mill-9", usable={"full_step_time_target": False})
    unread = [evaluate(row(gbs=None)), evaluate(row(gpu="?")), evaluate(row(gbs=None, usable=None))]
    found = summary_of([*rows, other, untimed, partial, *unread])
    assert (found["rows"], found["predicted"]) == (12, 9)
    assert found["not_predicted"] == {"the row lacks gbs": 2, "gpu=? has no preset": 1}
    time = found["step_time"]
    assert (time["targets"], time["coverage"]) == (10, 0.7)
    assert time["by_source"]["mill"] == pytest.approx(
        {"n": 6, "median": 0.15, "p90": 0.3, "bias": 0.05}, abs=1e-9
    )
    assert {name: part["n"] for name, part in time["by_source"].items()} == {"mill": 6, "forge": 1}
    assert {name: part["n"] for name, part in time["by_kind"].items()} == {"dense": 6, "moe": 1}
    assert set(time["by_precision"]) == {"bf16", "None"}
    assert time["by_gpu"]["A100-SXM4-80GB"]["n"] == time["by_framework"]["Megatron-Core"]["n"] == 7
    assert time["all"]["median"] == pytest.approx(0.2)


def test_memory_counts_where_the_shape_is_known() -> None:
    predicted = evaluate(ROW).memory_gib
    assert predicted
    rows = [
        evaluate(row(memory_gib_peak=predicted / 1.25)),
        evaluate(row(memory_gib_peak=predicted / 2, usable={"shape_known": True})),
        evaluate(ROW),
    ]
    found = summary_of(rows)["memory"]
    assert found["all"] == pytest.approx({"n": 1, "median": 0.25, "p90": 0.25, "bias": 0.25})
    assert set(found["by_source"]) == {"mill"}
    assert summary_of(rows[2:])["memory"]["all"] is None


def test_feasibility_where_a_source_has_both_kinds() -> None:
    fits, too_large = row(model=ROW["model"]), row(model=HUGE)
    rows = [fits, fits, fits, too_large, too_large | {"oom": True}, fits | {"oom": True}]
    found = summary_of([evaluate(one) for one in [*rows, fits | {"id": "forge-1"}]])["feasibility"]
    assert (found["ran"], found["ran_and_predicted_to_fit"]) == (5, 0.8)
    assert found["by_source"] == {
        "mill": {
            "ran": 4,
            "out_of_memory": 2,
            "ran_and_fits": 0.75,
            "out_of_memory_and_too_large": 0.5,
            "balanced_accuracy": 0.625,
        }
    }


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([4, 3, 2, 1], [10, 20, 30, 40], -1.0),
        ([2, 1, 3, 4], [10, 20, 30, 40], 2 / 3),  # one of six pairs is wrong
        ([1, 1, 2, 3], [10, 20, 30, 40], 5 / (5 * 6) ** 0.5),  # one tie
        ([1, 1, 1, 1], [10, 20, 30, 40], 0.0),
        ([1, 2], [10, 10], 0.0),
    ],
)
def test_kendall(predicted: list[float], measured: list[float], expected: float) -> None:
    assert kendall(predicted, measured) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 0.0),
        ([3, 1, 2], [10, 12, 30], 0.2),
        ([1, 1, 2], [10, 15, 30], 0.5),  # the worst of equals
    ],
)
def test_regret(predicted: list[float], measured: list[float], expected: float) -> None:
    assert regret(predicted, measured) == pytest.approx(expected)


PLANS: list[dict[str, Any]] = [{"tp": 1}, {"tp": 2}, {"tp": 4}, {"tp": 8}]


def test_plans_are_ranked_within_rows_that_differ_in_nothing_else() -> None:
    right = [wrong_by(0.1, **plan) for plan in PLANS]
    rows = [*right, wrong_by(0.0, tp=8, num_gpus=16, id="mill-5"), wrong_by(0.0, tp=8, gbs=128, id="mill-6")]
    rows += [wrong_by(0.0, **plan, id="forge-1") for plan in PLANS[:3]]  # too few
    found = ranking_of(rows)
    assert found["groups"] == 1
    assert found["ours"] == {"mean_tau": 1.0, "median_regret": 0.0, "p90_regret": 0.0}
    (group,) = found["by_group"]
    assert (group["source"], group["model"], group["gpus"], group["plans"]) == ("mill", "toy-1b", 8, 4)
    # The one-line formula sees no difference between them.
    assert group["baseline"]["tau"] == 0
    assert group["baseline"]["regret"] > 0


def test_the_same_plan_twice_counts_once_with_its_median() -> None:
    rows = [wrong_by(0.0, **plan) for plan in PLANS]
    best = min(rows, key=lambda found: found.cost.step_s if found.cost else 0.0)
    assert best.case
    assert best.case.measured_step_s
    slow = replace(best, case=replace(best.case, measured_step_s=99 * best.case.measured_step_s))
    found = ranking_of([*rows, slow])
    assert found["by_group"][0]["plans"] == 4
    assert found["ours"]["median_regret"] > 0  # half of a hundred times as slow
    assert ranking_of([]) == {"groups": 0, "ours": None, "baseline": None, "by_group": []}


def test_the_command_writes_one_object_a_line(tmp_path: Path, repository: Path) -> None:
    rows = [row(step_time_s=1.0), row(id="mill-2", vocab=None, model={}), row(id=None), [], "text"]
    given, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    given.write_text("\n".join([*map(json.dumps, rows), "", "{ not JSON", ""]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planner_accuracy", "--configs", str(given), "--json", str(out)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    written = json.loads(out.read_text())
    assert set(written) == {"rows", "summary"}
    assert written["summary"] == json.loads(done.stdout)
    assert [found["id"] for found in written["rows"]] == ["mill-0001", "mill-2", None, None, None, None]
    assert all(set(found) >= REQUIRED for found in written["rows"])
    assert [found["reason"] is None for found in written["rows"]] == [True, False, True, False, False, False]
    assert written["summary"]["rows"] == 6
    assert written["summary"]["predicted"] == 2
    assert sum(written["summary"]["not_predicted"].values()) == 4
