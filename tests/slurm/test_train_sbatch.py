"""The batch script, run as Slurm would run it, with stand-ins for srun and scontrol; the workers are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORDS = (
    *("strategy=fake", "monitor=none", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8"),
)


@pytest.fixture
def environment(tmp_path: Path, repository: Path) -> dict[str, str]:
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "srun": 'shift\nexec "$@"\n',
        "scontrol": f'case $1 in show) echo 127.0.0.1;; requeue) echo "$2" >> "{tmp_path}/requeued";; esac\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text("#!/usr/bin/env bash\n" + text)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1"}
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **job, "PATH": path, "PYTHONPATH": str(repository), "GLOO_SOCKET_IFNAME": "lo"}


def start(repository: Path, run: Path, *words: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [str(repository / "slurm" / "train.sbatch"), str(run), *WORDS, *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def last_step(run: Path) -> int:
    metrics = run / "metrics" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def test_a_run_that_ends_is_not_requeued(
    tmp_path: Path, repository: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "my run"
    with start(repository, run, "training.num_steps=5", environment=environment) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert last_step(run) == 5
    assert not (tmp_path / "requeued").exists()


def test_a_warning_saves_requeues_and_goes_on_in_the_same_folder(
    tmp_path: Path, repository: Path, environment: dict[str, str]
) -> None:
    run, reached = tmp_path / "run", 0
    for turn in (1, 2):
        with start(repository, run, "training.num_steps=10000000", environment=environment) as process:
            deadline = time.monotonic() + 120
            while last_step(run) <= reached and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert last_step(run) > reached
        reached = last_step(run)
        assert len((tmp_path / "requeued").read_text().splitlines()) == turn
        assert not (run / "stop").exists()
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.count("created") == 1
    assert events.count("resumed") == 1


def test_without_a_run_directory_it_says_how_it_is_used(
    repository: Path, environment: dict[str, str]
) -> None:
    script = str(repository / "slurm" / "train.sbatch")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "usage: train.sbatch RUN_DIR" in done.stderr
