"""The README's first command, whole: two ranks train on the standard library, and every record of it is read back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NUM_STEPS = 500


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first") / "run"
    words = ["train", "experiment=first_run", "cluster.gpus_per_node=2", f"run_dir={path}"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]


def test_validation_loss_falls_below_two_nats_per_byte(run: Path) -> None:
    validation = {m["step"]: m["validation_loss"] for m in metrics(run) if "validation_loss" in m}
    assert sorted(validation) == [100, 200, 300, 400, 500]
    assert validation[500] < 2.0 < math.log(256)


def test_the_plan_was_computed_and_checked(run: Path, call: Callable[..., Any]) -> None:
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["strategy"], plan["dp"]) == ("accelerate", 2)
    facts = call("show", str(run), "--json").json
    assert facts["state"] == "finished"
    assert facts["comparison"]["step_s"]["measured"] > 0
    assert facts["comparison"]["memory_bytes"]["measured"] > 0


def test_tensorboard_has_every_point(run: Path) -> None:
    events = EventAccumulator(str(run / "metrics" / "tensorboard")).Reload()
    recorded = [(event.step, event.value) for event in events.Scalars("train/loss")]
    written = [(m["step"], m["loss"]) for m in metrics(run)]
    assert [step for step, _ in recorded] == list(range(1, NUM_STEPS + 1))
    assert [value for _, value in recorded] == pytest.approx([loss for _, loss in written], rel=1e-6)
    assert len(events.Scalars("validation/loss")) == 5


def test_wandb_has_every_point(run: Path, wandb_reader: SimpleNamespace) -> None:
    (file,) = (run / "metrics" / "wandb").glob("offline-run-*/*.wandb")
    recorded = [(row["_step"], row["train/loss"]) for row in wandb_reader.history(file)]
    assert recorded == [(m["step"], m["loss"]) for m in metrics(run)]


def test_one_run_directory_holds_it_all(run: Path) -> None:
    env = json.loads((run / "env.json").read_text())
    assert env["versions"]["torch"]
    assert env["seed"] == 0
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step_0000000250",
        "step_0000000500",
    ]
    assert {path.name for path in (run / "logs").iterdir()} >= {"rank_00000.log", "rank_00001.log"}
