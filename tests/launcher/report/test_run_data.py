"""A run directory as its page needs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.errors import RunDirError
from launcher.report.run_data import load, load_all
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


def test_runs_of_one_name_are_told_apart(finished_run: RunDir, tmp_path: Path) -> None:
    parts = ("config.yaml", "plan.json", "env.json", "events.jsonl")
    for folder in ("a", "b"):
        (tmp_path / folder / "same").mkdir(parents=True)
        for part in parts:
            shutil.copy(finished_run.path / part, tmp_path / folder / "same")
    runs = [RunDir(path=tmp_path / folder / "same") for folder in ("a", "b")]
    assert [run.name for run in load_all(runs)] == ["a/same", "b/same"]
    assert [run.name for run in load_all(runs[:1])] == ["same"]
    assert [run.name for run in load_all([runs[0], runs[0]])] == ["same", "same"]


@pytest.mark.parametrize("file", ["env.json", "metrics/trace/summary.json"])
def test_damage_is_a_sentence(finished_run: RunDir, tmp_path: Path, file: str) -> None:
    run = RunDir(path=shutil.copytree(finished_run.path, tmp_path / "run"))
    (run.path / file).parent.mkdir(exist_ok=True)
    (run.path / file).write_text('{"first_step": ')
    with pytest.raises(RunDirError, match=f"{file} cannot be parsed; the run directory is damaged"):
        load(run, number=0)
