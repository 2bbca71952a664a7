"""plan.calibration=RUN_DIR: a finished run scales the predictions for its kind, and for no other."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli

Call = Callable[..., Any]
KIND = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=6"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that every test reads and none changes."""
    run = tmp_path_factory.mktemp("calibrate") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run(["train", *KIND, f"run_dir={run}"]) == 0
    return run


def last_measured(run: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    measured: dict[str, Any] = next(e["measured"] for e in reversed(events) if "measured" in e)
    return measured


def test_the_run_itself_is_then_predicted_as_it_was(call: Call, finished: Path) -> None:
    outcome = call("plan", *KIND, f"plan.calibration={finished}", "--json")
    assert outcome.code == 0, outcome.err
    plan, calibration = outcome.json, outcome.json["inputs"]["calibration"]
    measured = last_measured(finished)
    frozen = json.loads((finished / "plan.json").read_text(encoding="utf-8"))
    assert plan["micro_batch_size"] == frozen["micro_batch_size"]
    assert plan["predictions"]["step_s"] == pytest.approx(measured["step_s"])
    assert calibration["time"] == pytest.approx(measured["step_s"] / frozen["predictions"]["step_s"])
    assert calibration["memory"] > 0 and calibration["run"] == str(finished)
    assert calibration["host"] and calibration["date"].endswith("+00:00")
    text = call("plan", *KIND, f"plan.calibration={finished}").out
    assert f"scaled by {calibration['time']:.3g} (time)" in text and f"measured in {finished} on" in text


def test_more_ranks_may_follow_from_fewer(call: Call, finished: Path) -> None:
    words = [word for word in KIND if not word.startswith("cluster.gpus_per_node")]
    plain = call("plan", *words, "cluster.gpus_per_node=2", "--json").json
    found = call("plan", *words, "cluster.gpus_per_node=2", f"plan.calibration={finished}", "--json").json
    factor = found["inputs"]["calibration"]["time"]
    assert found["predictions"]["step_s"] == pytest.approx(factor * plain["predictions"]["step_s"])


def test_a_calibrated_run_does_not_count_its_factor_twice(call: Call, finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    outcome = call("train", *KIND, f"plan.calibration={finished}", f"run_dir={again}", "--json")
    assert outcome.code == 0, outcome.err
    found = call("plan", *KIND, f"plan.calibration={again}", "--json").json
    assert found["predictions"]["step_s"] == pytest.approx(last_measured(again)["step_s"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["strategy=accelerate"], "was measured with strategy=fake, not strategy=accelerate"),
        (["strategy=auto"], "use strategy=fake"),
        (["cluster=h100_sxm", "training.precision=fp32"], "was measured with cluster.gpu.name="),
        (["training.precision=bf16"], "was measured with training.precision=fp32"),
        (["model=gpt2_124m"], "was measured with model=debug_tiny, not model=gpt2_124m"),
        (["model.num_layers=3"], "was measured with another shape of model=debug_tiny"),
    ],
)
def test_a_run_of_another_kind_is_refused(
    call: Call, finished: Path, changes: list[str], sentence: str
) -> None:
    words = [word for word in KIND if word.split("=")[0] not in {change.split("=")[0] for change in changes}]
    outcome = call("plan", *words, *changes, f"plan.calibration={finished}")
    assert outcome.code == 2
    assert sentence in outcome.err


def test_a_run_that_measured_nothing_is_refused(call: Call, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    events = copy / "events.jsonl"
    kept = [line for line in events.read_text(encoding="utf-8").splitlines() if '"measured"' not in line]
    events.write_text("\n".join(kept) + "\n", encoding="utf-8")
    outcome = call("plan", *KIND, f"plan.calibration={copy}")
    assert outcome.code == 2
    assert "holds no measured step time and memory; let that run finish" in outcome.err


@pytest.mark.parametrize("more", [0, 2])
def test_a_folder_of_runs_counts_by_the_one_in_the_middle(
    call: Call, finished: Path, tmp_path: Path, more: int
) -> None:
    folder = tmp_path / "several"
    for number, factor in enumerate((1.0, 4.0, 2.0)[: 1 + more]):
        copy = Path(shutil.copytree(finished, folder / str(number)))
        lines = [
            json.loads(line) for line in (copy / "events.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for line in lines:
            if "measured" in line:
                line["measured"]["step_s"] *= factor
        (copy / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    outcome = call("plan", *KIND, f"plan.calibration={folder}", "--json")
    if not more:
        assert outcome.code == 2 and "holds 1 runs that tell about this job and 3 are needed" in outcome.err
        return
    one = call("plan", *KIND, f"plan.calibration={finished}", "--json").json["inputs"]["calibration"]
    found = outcome.json["inputs"]["calibration"]
    assert found["time"] == pytest.approx(2 * one["time"]) and found["memory"] == pytest.approx(one["memory"])
    assert found["run"] == str(folder)
    other = call("plan", *KIND, "model.num_layers=3", f"plan.calibration={folder}")
    assert other.code == 2 and "holds 0 runs" in other.err and "another shape of model" in other.err


def test_a_folder_that_is_no_run_is_refused(call: Call, tmp_path: Path) -> None:
    outcome = call("plan", *KIND, f"plan.calibration={tmp_path / 'nowhere'}")
    assert outcome.code == 2
    assert "plan.calibration: run directory" in outcome.err and "does not exist" in outcome.err
