"""Training, stopping, resuming as a person meets them, with the strategy that needs no engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
TINY = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=6"),
)


def test_train_freezes_runs_and_reports(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = call("train", *TINY, f"run_dir={run}", "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    assert (facts["state"], facts["step"]) == ("finished", 6)
    names = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "plan.json",
        "data.json",
        "env.json",
        "events.jsonl",
        "metrics",
        "checkpoints",
    } <= names
    plan = json.loads((run / "plan.json").read_text())
    assert plan["strategy"] == "fake"
    assert plan["dp"] == 1
    assert plan["predictions"]["memory_bytes"] > 0
    metrics = [json.loads(line) for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    env = json.loads((run / "env.json").read_text())
    for key in ("config", "versions", "git", "hosts", "dataset_hash", "tokenizer_hash", "seed", "command"):
        assert key in env
    shown = call("show", str(run), "--json").json
    assert shown["metrics"] == metrics[-1]
    text = call("show", str(run)).out
    assert "finished at step 6 of 6" in text
    assert "predicted" in text


def test_stop_and_resume(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", *TINY, f"run_dir={run}", "stop_at_step=3", "--json").json["state"] == "stopped"
    resumed = call("resume", str(run), "--json")
    assert resumed.code == 0
    assert (resumed.json["state"], resumed.json["step"]) == ("finished", 6)
    again = call("resume", str(run), "--json")
    assert again.code == 0
    assert again.json["step"] == 6


def test_default_run_directories_do_not_collide(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = call("train", *TINY, "--json").json["run_dir"]
    second = call("train", *TINY, "--json").json["run_dir"]
    assert first != second
    assert Path(first).parent == Path(second).parent == tmp_path / "runs"


def test_ctrl_c_saves_and_leaves_with_130(tmp_path: Path, repository: Path) -> None:
    run = tmp_path / "run"
    words = [*TINY[:-1], "training.num_steps=1000000", f"run_dir={run}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "train", *words],
        cwd=repository,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = run / "metrics" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert len(list((run / "checkpoints").glob("step_*/manifest.json"))) == 1
    assert not (run / "stop").exists()
