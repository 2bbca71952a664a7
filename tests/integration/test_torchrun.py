"""For people who live in torchrun: `torchrun ... -m launcher train ...`, and a restart in the same folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = (
    *("monitor=none", "data.max_bytes=200000", "model.num_layers=2", "evaluation.num_sequences=8"),
    *("training.sequence_length=64", "training.global_batch_size=8"),
)


def torchrun(*words: str, options: tuple[str, ...] = ()) -> list[str]:
    meet = (
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    )
    return [sys.executable, "-m", "torch.distributed.run", *meet, *options, "-m", "launcher", *words]


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in told if event["event"] == name]


@pytest.fixture
def environment(repository: Path) -> dict[str, str]:
    switch = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **switch, "PYTHONPATH": str(repository)}


def test_train_and_resume_under_torchrun(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tmp_path / "run"
    command = torchrun("train", *SMALL, "training.num_steps=4", "stop_at_step=2", f"run_dir={run}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "plan.json").read_text())["dp"] == 2
    done = subprocess.run(
        torchrun("resume", str(run)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(run) == [1, 2, 3, 4]


def test_a_default_run_directory_is_found_by_all_ranks_who_tell_once_what_they_all_raise(
    tmp_path: Path, environment: dict[str, str], webhook: Any
) -> None:
    spoiled = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0")
    command = torchrun("train", *SMALL, "training.num_steps=50", *spoiled)
    address = {"MESHWRIGHT_WEBHOOK_URL": webhook.url}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | address, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 1, done.stdout + done.stderr
    assert 0 < max(steps(runs[0])) < 50
    (failed,) = events(runs[0], "failed")
    assert (failed["cause"], failed["exit_code"], failed["step"]) == ("bad_loss", 14, max(steps(runs[0])))
    assert webhook.told()["bad_loss"] == 1
    assert len(list((runs[0] / "errors").glob("rank_*.json"))) in (1, 2)  # torchrun may have been faster


def test_a_wrong_key_ends_all_ranks_with_the_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    command = torchrun("train", "training.num_step=4", f"run_dir={tmp_path / 'run'}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "unknown key 'training.num_step'; did you mean 'num_steps'?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_is_restarted_in_the_same_folder_and_told_once(
    tmp_path: Path, environment: dict[str, str], webhook: Any
) -> None:
    run = tmp_path / "run"
    words = (*SMALL, "training.num_steps=60", "checkpoint.interval=10", f"run_dir={run}")
    process = subprocess.Popen(
        torchrun("train", *words, options=("--max-restarts=2",)),
        env=environment | {"MESHWRIGHT_WEBHOOK_URL": webhook.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not list(run.glob("checkpoints/step_*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = next(
        child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"
    )
    worker.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert steps(run) == list(range(1, 61))
    assert len(events(run, "created")) == 1
    assert events(run, "resumed")
    # By a survivor that lost its peer, else by the start that follows: torchrun may end survivors before they know.
    (failed,) = events(run, "failed")
    assert (failed["cause"], failed["exit_code"]) == ("lost_rank", 12)
    assert webhook.told()["lost_rank"] == 1
