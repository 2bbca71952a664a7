"""What a point's folder tells: its steps after every warm-up, its state in the queue, and what it died of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.run_dir import RunDir
from launcher.submit import slurm
from launcher.submit.slurm import JobState
from launcher.sweep.folder import open_sweep
from launcher.sweep.measured import stand, standing, warm_steps
from launcher.sweep.standings import Standing


def test_steps_behind_every_start_are_left_out() -> None:
    metrics = [{"step": step, "step_time_s": float(step)} for step in range(1, 11)]
    events = [
        {"event": "created"},
        {"event": "started", "step": 0},
        {"event": "stopped", "step": 5},
        {"event": "started", "step": 5},
    ]
    assert warm_steps(metrics, events, warmup=2) == [3.0, 4.0, 5.0, 8.0, 9.0, 10.0]
    assert warm_steps(metrics[:2], events, warmup=2) == []
    traced = [{**record, "traced": True} if record["step"] == 4 else record for record in metrics]
    assert warm_steps(traced, events, warmup=2) == [3.0, 5.0, 8.0, 9.0, 10.0]


def test_every_point_of_a_finished_sweep_has_its_figures(swept: Path) -> None:
    found = stand(open_sweep(swept))
    assert len(found.ranked) == 3 and found.is_over
    assert [dropped["exit_code"] for dropped in found.dropped] == [3]
    for point in found.points:
        assert point.tokens_per_s == pytest.approx(256 / (point.measured_s or 0))
        assert point.measured_bytes and point.step == point.num_steps == 12


@pytest.fixture
def point(swept: Path, tmp_path: Path) -> RunDir:
    """The first point of the sweep as it was before it was started."""
    run = RunDir(path=Path(shutil.copytree(swept, tmp_path / "s")) / "01-micro_batch_size-1")
    first = run.events_file.read_text(encoding="utf-8").splitlines()[0]
    run.events_file.write_text(first + "\n", encoding="utf-8")
    run.metrics_file.write_text("", encoding="utf-8")
    return run


def told(
    run: RunDir, job: JobState, monkeypatch: pytest.MonkeyPatch, **errors: Mapping[str, Any]
) -> Standing:
    monkeypatch.setattr(slurm, "ask", lambda number: job)
    run.errors.mkdir(exist_ok=True)
    for name, error in errors.items():
        (run.errors / f"{name}.json").write_text(json.dumps(error))
    return standing(run, open_sweep(run.path.parent).record.points[0])


def test_a_point_in_the_queue_waits(point: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(point, JobState(state="PENDING"), monkeypatch).state == "created", "nothing is queued yet"
    point.log_event("submitted", job="7")
    assert told(point, JobState(state="PENDING"), monkeypatch).state == "queued"
    assert told(point, JobState(state="RUNNING"), monkeypatch).state == "starting"
    assert told(point, JobState(state="RUNNING"), monkeypatch).measured_s is None


def test_of_a_chain_the_job_tells_whose_turn_it_is(point: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = open_sweep(point.path.parent).record.points[0]
    states = {"7": "RUNNING", "8": "PENDING"}
    monkeypatch.setattr(slurm, "ask", lambda number: JobState(state=states[number]))
    for number in states:
        point.log_event("submitted", job=number)
    point.log_event("started", step=0)
    assert standing(point, entry).state == "running"
    states["7"] = "COMPLETED"
    assert standing(point, entry).state == "queued"
    states["8"] = "FAILED"
    assert standing(point, entry).state == "failed"


def test_a_lost_host_is_no_end_where_the_job_goes_on(point: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    point.log_event("submitted", job="7")
    point.log_event("started", step=0)
    point.log_event("failed", message="host b is lost", exit_code=12)
    assert told(point, JobState(state="RUNNING"), monkeypatch).state == "starting"
    assert told(point, JobState(state="PENDING"), monkeypatch).state == "queued"
    ended = told(point, JobState(state="NODE_FAIL"), monkeypatch)
    assert (ended.state, ended.cause, ended.exit_code) == ("failed", "host b is lost", 12)


def test_a_job_that_ended_names_its_cause(point: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    point.log_event("submitted", job="7")
    ended = told(point, JobState(state="TIMEOUT", exit_code=0), monkeypatch)
    assert (ended.state, ended.exit_code) == ("failed", 9)
    assert ended.cause is not None and ended.cause.startswith("the job ended as TIMEOUT; see ")
    errors = {
        "rank_00001": {"time": 2.0, "message": "peer is gone", "exit_code": 12},
        "rank_00000": {"time": 1.0, "message": "out of memory", "exit_code": 10},
    }
    died = told(point, JobState(state="FAILED", exit_code=1), monkeypatch, **errors)
    assert (died.cause, died.exit_code) == ("out of memory", 10)
    assert died.has_failed


def test_a_failure_here_is_told_by_its_event(point: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    point.log_event("failed", message="the disk is full", exit_code=5)
    found = told(point, JobState(state="UNKNOWN"), monkeypatch)
    assert (found.state, found.cause, found.exit_code) == ("failed", "the disk is full", 5)
