"""What the batch script says before it asks Slurm for anything; the rest of it runs in test_cluster.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


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


@pytest.mark.parametrize(("state", "kept"), [("RUNNING", False), ("NODE_FAIL", True)])
def test_a_chain_remembers_the_hosts_only_of_a_start_that_slurm_has_ended(
    repository: Path, frozen: Path, tmp_path: Path, state: str, kept: bool
) -> None:
    commands = {
        "scontrol": f'case "$*" in *hostnames*) echo node1 ;; *job*) echo JobState={state} ;; esac',
        "srun": 'case "$*" in *--ntasks=1*) cat ;; *) exit 5 ;; esac',  # the workers die
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = run(repository, str(frozen), "requeue=no", PATH=path, SLURM_GPUS_ON_NODE="1")
    assert done.returncode == 5, done.stderr
    assert ("left with code 5; the next job goes on" in done.stderr) != kept
    hosts = frozen / "logs" / "slurm_hosts"
    assert (hosts.read_text() if hosts.exists() else "") == ("node1\n" if kept else "")


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
