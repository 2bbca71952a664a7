"""Runs that are frozen and not started, and stand-ins for workers: plain scripts, so that a start takes no seconds."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import compose, freeze
from launcher.config import Job
from launcher.output import Output
from launcher.run_dir import RunDir
from launcher.submit import hosts, local
from launcher.supervise import notes

SMALL = (
    *(
        "strategy=fake",
        "monitor=none",
        "data.max_bytes=300000",
        "model.num_layers=2",
        "training.sequence_length=64",
    ),
    *(
        "training.global_batch_size=8",
        "training.num_steps=20",
        "evaluation.num_sequences=8",
        "plan.tp=1",
        "plan.pp=1",
    ),
    *("cluster.gpus_per_node=2", "supervise.backoff_s=0", "supervise.health_interval_s=0.05"),
)


@pytest.fixture
def frozen(tmp_path: Path) -> Callable[..., RunDir]:
    """Freeze a run of two ranks on processors, with these words on top."""

    def make(*words: str) -> RunDir:
        (job,) = compose.jobs([*SMALL, f"run_dir={tmp_path / 'run'}", *words])
        return freeze.freeze(job, Output(as_json=True), runs_here=False)

    return make


TWO_HOSTS = (
    *("cluster.num_nodes=2", "cluster.gpus_per_node=1", "submit=torchrun", "submit.hosts=[127.0.0.1,b]"),
    *("supervise.host_timeout_s=2", "supervise.host_wait_s=3"),
)


@pytest.fixture
def on_two_hosts(frozen: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of two ranks on two hosts, both of them this one, whose launchers talk fast and soon lose patience."""
    monkeypatch.setattr(notes, "BEAT_S", 0.05)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    run = frozen(*TWO_HOSTS, f"submit.port={port - 1}")
    run.hosts.mkdir()
    return run


@pytest.fixture
def small_job() -> Job:
    """The configuration of such a run."""
    (job,) = compose.jobs(list(SMALL))
    return job


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let this code, which finds the run in `run` and the number of the start in `start`, stand for the workers."""
    head = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom launcher.heartbeat import Heart\n"
        "from launcher.run_dir import RunDir, write_error\nfrom launcher.errors import *\n"
        "run = RunDir(path=Path(sys.argv[1]))\n"
        "start = sum(event['event'] == 'launched' for event in run.events())\n"
    )

    def stand_in(code: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(head + code)

        def argv(*, run_dir: Path, **rest: Any) -> list[str]:
            return [sys.executable, str(script), str(run_dir)]

        def torchrun_argv(path: Path, **rest: Any) -> list[str]:
            return argv(run_dir=path)

        monkeypatch.setattr(local, "argv", argv)
        monkeypatch.setattr(hosts, "torchrun_argv", torchrun_argv)

    return stand_in
