"""What torchrun's ranks are known by, and what they become; whole starts are in tests/integration/test_torchrun.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from launcher import run_dir, torchrun
from launcher.errors import RunDirError
from launcher.run_dir import RunDir


def test_torchrun_is_known_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not torchrun.started_us()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun.started_us()


def test_taking_over_locks_the_run_and_forgets_a_stop_and_the_last_start(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    left = [run.errors / "rank_00000.json", run.errors / "rank_00000.txt", run.heartbeats / "rank_00001.json"]
    new = run.errors / "rank_00001.json"  # a rank of this start was faster
    for file in (*left, new):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    os.utime(new, (time.time() + 5,) * 2)
    for file in left:
        os.utime(file, (torchrun.begun() - 1.5,) * 2)
    run.stop_file.touch()
    run.leave_file.touch()
    torchrun.take_over(run)
    assert not run.stop_file.exists() and not run.leave_file.exists()
    assert not any(file.exists() for file in left) and new.exists()
    with pytest.raises(RunDirError, match="in use"):
        run_dir.lock(run)


def test_the_worker_takes_our_place(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: became.append((path, argv)))
    torchrun.become_worker(["--share", "run"])
    assert became == [(sys.executable, [sys.executable, "-m", "launcher.training.worker", "--share", "run"])]
