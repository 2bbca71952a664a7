"""When nothing comes any more: by a run's events, and by what Slurm says of its jobs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.verbs import over
from launcher.verbs.over import End


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that has begun, on a host whose commands are those of a folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    run = RunDir(path=tmp_path)
    run.log_event("created")
    run.log_event("started")
    return run


def slurm_says(run: RunDir, answer: str) -> None:
    tool = run.path / "bin" / "scontrol"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)


def test_a_failure_is_no_end_before_a_launcher_had_time_to_start_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = End(run)
    assert not end.has_come()
    run.log_event("failed")
    assert not end.has_come()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert end.has_come()
    run.log_event("finished")
    assert end.has_come()


def test_slurm_knows_whether_a_stopped_run_comes_back(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log_event("submitted", job="7")
    run.log_event("stopped")
    end, now, ticks = End(run), time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    slurm_says(run, "echo JobId=7 JobState=PENDING Restarts=1")
    assert not end.has_come()
    slurm_says(run, "echo JobId=7 JobState=CANCELLED Restarts=1")
    assert not end.has_come(), "asked again at once"
    monkeypatch.setattr(time, "monotonic", lambda: ticks + 60)
    assert end.has_come()


def test_events_decide_where_slurm_does_not_answer(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log_event("submitted", job="7")
    run.log_event("stopped")
    assert not End(run).has_come()
    monkeypatch.setattr(over, "_REMEDY_S", 0.0)
    assert End(run).has_come()
