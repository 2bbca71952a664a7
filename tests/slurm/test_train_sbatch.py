"""What the batch script says before it asks Slurm for anything; the rest of it runs in test_cluster.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Train = Callable[..., subprocess.CompletedProcess[str]]


def run(repository: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"}
    return subprocess.run(
        [str(repository / "slurm" / "train.sbatch"), *words],
        env={**os.environ, **job, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """A run directory as far as the script looks at it."""
    path = tmp_path / "my run"
    for folder in ("logs", "checkpoints"):
        (path / folder).mkdir(parents=True)
    (path / "events.jsonl").write_text('{"time": 1.0, "event": "created"}\n')
    return path


def test_without_a_run_directory_it_says_how_it_is_used(repository: Path) -> None:
    done = run(repository)
    assert done.returncode == 1
    assert "usage: train.sbatch RUN_DIR" in done.stderr


def test_a_word_it_does_not_know_is_named(repository: Path, frozen: Path) -> None:
    done = run(repository, str(frozen), "pyton=python3")
    assert done.returncode == 2
    assert "'pyton=python3' is no word of mine" in done.stderr


def test_a_finished_run_is_left_alone(repository: Path, frozen: Path) -> None:
    with (frozen / "events.jsonl").open("a") as file:
        file.write('{"time": 2.0, "event": "finished"}\n{"time": 3.0, "event": "compared"}\n')
    done = run(repository, str(frozen))
    assert done.returncode == 0
    assert "the run is finished, nothing is left to do" in done.stderr


def test_starts_without_a_newer_checkpoint_are_counted(repository: Path, frozen: Path) -> None:
    manifest = frozen / "checkpoints" / "step_0000000020" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    newest = "./step_0000000020/manifest.json"
    (frozen / "logs" / "slurm_starts").write_text(f"none\nnone\n{newest}\n{newest}\n")
    done = run(repository, str(frozen), "max_restarts=1")
    assert done.returncode == 9
    assert f"2 starts from the same checkpoint ({newest}) have brought no newer one" in done.stderr


@pytest.fixture
def train(repository: Path, frozen: Path, tmp_path: Path) -> Train:
    """Run the script to its end, with stand-ins for Slurm's commands: the workers end with code 5.

    What the workers' and the telling's srun do besides, and where the job stands then, is the test's to say.
    """

    def started(
        *words: str, workers: str = ":", telling: str = ":", state: str = "RUNNING"
    ) -> subprocess.CompletedProcess[str]:
        told = f'*unwatched*) echo "$*" >>"{tmp_path}/told"; {telling} ;;'
        commands = {
            "scontrol": f'case "$*" in *hostnames*) echo node1 ;; *job*) echo JobState={state} ;; esac',
            "srun": f'case "$*" in {told} *--ntasks=1*) cat ;; *) {workers}; exit 5 ;; esac',
            "timeout": f'shift 2; exec {shutil.which("timeout")} 1 "$@"',
        }
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in commands.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        return run(repository, str(frozen), *words, PATH=path, SLURM_GPUS_ON_NODE="1")

    return started


@pytest.mark.parametrize(("state", "kept"), [("RUNNING", False), ("NODE_FAIL", True)])
def test_a_chain_remembers_the_hosts_only_of_a_start_that_slurm_has_ended(
    train: Train, frozen: Path, state: str, kept: bool
) -> None:
    done = train("requeue=no", state=state)
    assert done.returncode == 5, done.stderr
    assert ("left with code 5; the next job goes on" in done.stderr) != kept
    hosts = frozen / "logs" / "slurm_hosts"
    assert (hosts.read_text() if hosts.exists() else "") == ("node1\n" if kept else "")


@pytest.mark.parametrize("telling", [":", "exit 1", "exec sleep 60"])
def test_a_failure_is_told_once_and_however_that_goes_the_job_goes_on(
    train: Train, frozen: Path, tmp_path: Path, telling: str
) -> None:
    beat = frozen / "heartbeats" / "rank_00000.json"  # of the start before
    beat.parent.mkdir()
    beat.touch()
    done = train("prefix=in", "prefix=box", telling=telling)
    assert done.returncode == 0, done.stderr  # of scontrol requeue
    assert "left with code 5; requeued" in done.stderr
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert "--nodes=1 --ntasks=1 in box python -m launcher.supervise.unwatched " in told
    assert told.endswith(f" {frozen} 5 {frozen}/logs {(frozen / 'logs').stat().st_size}")
    events = [json.loads(line)["event"] for line in (frozen / "events.jsonl").read_text().splitlines()]
    assert events == ["created", *(["restarting"] if telling == ":" else [])]
    assert ("the failure could not be told" in done.stderr) == (telling != ":")
    assert not beat.exists()


@pytest.mark.parametrize("why", ["USR1", "USR2", "CANCELLED", "NODE_FAIL", "finished"])
def test_what_slurm_or_a_person_ended_is_no_failure(
    train: Train, frozen: Path, tmp_path: Path, why: str
) -> None:
    finish = f'echo \'{{"time": 2.0, "event": "finished"}}\' >>"{frozen}/events.jsonl"'
    done = {
        "USR1": lambda: train("requeue=no", workers="kill -USR1 $PPID; sleep 0.3"),
        "USR2": lambda: train("requeue=no", workers="kill -USR2 $PPID; sleep 0.3"),
        "finished": lambda: train("requeue=no", workers=finish),
    }.get(why, lambda: train("requeue=no", state=why))()
    assert done.returncode == (0 if why == "finished" else 5), done.stderr
    assert not (tmp_path / "told").exists()


def test_shell_scripts_are_clean(repository: Path) -> None:
    tool = shutil.which("shellcheck")
    if tool is None and "MESHWRIGHT_TEST_SLURM" not in os.environ:
        pytest.skip("shellcheck is not installed; Debian's package has its name")
    assert tool is not None
    scripts = [
        repository / "slurm" / "train.sbatch",
        *(repository / "slurm" / "test_cluster").glob("*.sh"),
        repository / ".ci" / "run",
        repository / "bootstrap.sh",
    ]
    done = subprocess.run([tool, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
