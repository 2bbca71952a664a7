"""What people and machines do to a running job: hang up, kill, close the pipe, fill the disk, start twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.run_dir import RunDir

ENDLESS = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=1000000"),
)


@contextmanager
def training(run: Path, *, stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose worker has made its first step."""
    command = [sys.executable, "-m", "launcher", "train", *ENDLESS, f"run_dir={run}"]
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as process:
        metrics = run / "metrics" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def workers(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (
            "launcher.training.worker" in (process.info["cmdline"] or [])
            and str(run) in process.info["cmdline"]
        ):
            found.append(process)
    return found


def manifests(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("step_*/manifest.json"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_has_its_exit_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    with training(run) as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    assert len(manifests(run)) == 1
    assert workers(run) == []


def test_workers_of_a_killed_launcher_save_and_leave(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(run) as process:
        process.kill()
        process.wait()
    wait_for(lambda: not workers(run), seconds=60)
    assert len(manifests(run)) == 1


def test_a_killed_rank_is_named_and_resume_goes_on(tmp_path: Path, call: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    words = [
        "monitor=none",
        "cluster.gpus_per_node=2",
        "data.max_bytes=200000",
        "training.sequence_length=32",
    ]
    words += [
        "training.global_batch_size=8",
        "training.num_steps=400",
        "checkpoint.interval=5",
        "supervise.max_restarts=0",
        f"run_dir={run}",
    ]
    command = [sys.executable, "-m", "launcher", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(manifests(run)))
        victim = next(worker for worker in workers(run) if worker.environ().get("RANK") == "1")
        victim.kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 12
    last = err.strip().splitlines()[-1]
    assert "rank 1 on" in last and "was killed by SIGKILL" in last
    assert "not started again: supervise.max_restarts=0 are used up" in last
    outcome = call("resume", str(run), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["state"] == "finished"


def test_a_second_launcher_is_refused(tmp_path: Path, call: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    with training(run) as process:
        outcome = call("resume", str(run), "--json")
        assert outcome.code == 5
        assert "is in use by another launcher" in outcome.json["error"]["message"]
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def test_training_goes_on_when_the_reader_leaves(tmp_path: Path, repository: Path) -> None:
    words = " ".join([*ENDLESS[:-1], "training.num_steps=50", f"run_dir={tmp_path / 'run'}"])
    command = f"{sys.executable} -m launcher train {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0", done.stderr
    lines = (tmp_path / "run" / "metrics" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 50


def test_training_works_without_standard_output(tmp_path: Path, repository: Path) -> None:
    words = " ".join([*ENDLESS[:-1], "training.num_steps=5", f"run_dir={tmp_path / 'run'}"])
    command = f"{sys.executable} -m launcher train {words} >&-"
    done = subprocess.run(
        ["bash", "-c", command], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(manifests(tmp_path / "run")) == 1


def test_a_full_disk_is_named_and_keeps_the_older_checkpoint(tmp_path: Path, repository: Path) -> None:
    """A limit on the size of files fails writes as a full disk does, for everybody and without a mount."""
    run = tmp_path / "run"
    words = [
        "monitor=none",
        "cluster.gpus_per_node=1",
        "data.max_bytes=200000",
        "training.sequence_length=32",
    ]
    words += ["training.global_batch_size=8", "training.num_steps=4", f"run_dir={run}", "stop_at_step=2"]
    first = subprocess.run([sys.executable, "-m", "launcher", "train", *words], cwd=repository, check=False)
    assert first.returncode == 0
    command = f"ulimit -f 1000; exec {sys.executable} -m launcher resume {run}"  # blocks of 1 KiB
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 6, done.stderr
    assert "checkpoint of step 4 could not be written" in done.stderr.strip().splitlines()[-1]
    assert [path.parent.name for path in manifests(run)] == ["step_0000000002"]
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_a_run_told_to_continue_trains_through_a_full_disk(tmp_path: Path) -> None:
    """Writes fail for a while, under way and beside the training; the checkpoint before stays, a later one comes."""
    run = tmp_path / "run"
    words = [
        "monitor=none",
        "cluster.gpus_per_node=1",
        "data.max_bytes=200000",
        "training.sequence_length=32",
    ]
    words += ["training.global_batch_size=8", "training.num_steps=1000000", f"run_dir={run}"]
    words += ["checkpoint.interval=4", "checkpoint.on_failed_save=continue"]
    command = [sys.executable, "-m", "launcher", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(manifests(run)))
        (worker,) = workers(run)
        worker.rlimit(psutil.RLIMIT_FSIZE, (500_000, psutil.RLIM_INFINITY))
        wait_for(lambda: len(named(run, "checkpoint_failed")) >= 2)
        kept = newest_good(run)
        assert kept < named(run, "checkpoint_failed")[-1]["step"]
        worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        wait_for(lambda: newest_good(run) > kept)
        (run / "stop").touch()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert newest_good(run) == named(run, "stopped")[0]["step"]
    assert "could not be written" in (run / "logs" / "rank_00000.log").read_text()


def named(run: Path, event: str) -> list[dict[str, Any]]:
    return [each for each in RunDir(path=run).events() if each["event"] == event]


def newest_good(run: Path) -> int:
    opened = RunDir(path=run)
    found = opened.tiers(opened.job().checkpoint).latest_good(lambda sentence: None)
    assert found is not None
    return found[1].step
