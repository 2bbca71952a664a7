from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import run_dir
from launcher.errors import RunDirError
from launcher.run_dir import RunDir

TINY = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=2"),
)


@pytest.fixture
def run(call: Callable[..., Any], tmp_path: Path) -> RunDir:
    assert call("train", *TINY, f"run_dir={tmp_path / 'run'}", "--json").code == 0
    return run_dir.open_run(tmp_path / "run")


def test_what_was_frozen_opens_again(run: RunDir) -> None:
    job, plan, dataset = run.job(), run.plan(), run.dataset()
    assert plan.strategy == "fake"
    assert plan.global_batch_size == job.training.global_batch_size == 8
    assert dataset.is_whole()
    assert job.run_dir == str(run.path)


def test_events_are_ordered_and_survive_a_torn_line(run: RunDir) -> None:
    with run.events_file.open("a") as file:
        file.write('{"time": 1, "ev')
    names = [event["event"] for event in run.events()]
    assert names[:3] == ["created", "launched", "started"]
    assert names[-1] == "finished"
    times = [event["time"] for event in run.events()]
    assert times == sorted(times)


def test_writing_an_event_tells_nobody(run: RunDir, webhook: Any) -> None:
    run.log_event("failed", cause="lost_rank", message="gone")
    assert webhook.taken == []
    assert not (run.metrics / "alerts.jsonl").exists()


def test_a_failed_freeze_leaves_nothing(run: RunDir, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"strategy": object()}  # cannot be written as JSON
    with pytest.raises(TypeError):
        run_dir.create(tmp_path / "other", job=run.job(), plan=plan, dataset=run.dataset(), provenance={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_empty_folder_may_become_a_run(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    plan = run.plan_data()
    made = run_dir.create(tmp_path / "empty", job=run.job(), plan=plan, dataset=run.dataset(), provenance={})
    assert made.plan() == run.plan()


def test_a_start_is_forgotten_up_to_a_moment(run: RunDir) -> None:
    left = [run.errors / "rank_00000.json", run.errors / "rank_00001.txt", run.heartbeats / "rank_00001.json"]
    for age, file in enumerate(left):
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (100.0 - age, 100.0 - age))
    run_dir.forget_start(run, before=99.5)
    assert [file.exists() for file in left] == [True, False, False]
    run_dir.forget_start(run)
    assert not left[0].exists()


def test_a_newer_plan_format_is_refused(run: RunDir) -> None:
    run.plan_file.write_text(json.dumps({**run.plan_data(), "format": 99}))
    with pytest.raises(RunDirError, match="format 99"):
        run_dir.open_run(run.path)


def test_one_launcher_at_a_time(run: RunDir) -> None:
    descriptor = run_dir.lock(run)
    with pytest.raises(RunDirError, match="is in use by another launcher"):
        run_dir.lock(run)
    os.close(descriptor)
    os.close(run_dir.lock(run))


def test_each_host_has_a_lock_of_its_own(run: RunDir) -> None:
    descriptors = [run_dir.lock(run, node=node) for node in (0, 1, 2)]
    with pytest.raises(RunDirError, match=r"is in use by another launcher"):
        run_dir.lock(run, node=1)
    for descriptor in descriptors:
        os.close(descriptor)


def test_the_first_plan_is_remembered(run: RunDir) -> None:
    frozen = run.plan()
    assert run.first_plan() == frozen
    for steps in (2, 4):
        run_dir.refreeze(run, job=run.job(), plan={**run.plan_data(), "num_microbatches": steps})
    assert run.plan().num_microbatches == 4
    assert run.first_plan() == frozen


def test_workers_hold_the_lock_of_a_launcher_that_died(run: RunDir) -> None:
    descriptor = run_dir.lock(run)
    worker = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    os.close(descriptor)
    try:
        with pytest.raises(RunDirError, match="or its workers"):
            run_dir.lock(run)
    finally:
        worker.kill()
        worker.wait()
    os.close(run_dir.lock(run))


def test_the_same_start_gets_the_same_name_and_others_do_not(tmp_path: Path) -> None:
    first = run_dir.default_path(model="m", strategy="s", root=tmp_path, started=0.0)
    assert first == tmp_path / "runs" / "19700101-000000-m-s"
    assert run_dir.default_path(model="m", strategy="s", root=tmp_path, started=0.0) == first
    fresh = run_dir.default_path(model="m", strategy="s", root=tmp_path)
    fresh.mkdir(parents=True)
    assert run_dir.default_path(model="m", strategy="s", root=tmp_path) != fresh


def test_an_error_keeps_its_traceback(run: RunDir) -> None:
    run_dir.write_error(run, rank=3, host="h", error=ValueError("boom"), frame="a.py:1", trace="the trace")
    record = json.loads((run.errors / "rank_00003.json").read_text())
    assert (record["type"], record["exit_code"], record["rank"]) == ("ValueError", 1, 3)
    assert Path(record["traceback"]).read_text() == "the trace"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "unknown"),
        (["created"], "created"),
        (["created", "launched"], "starting"),
        (["created", "launched", "started", "checkpoint"], "running"),
        (["created", "launched", "started", "checkpoint", "finished"], "finished"),
        (["created", "launched", "started", "stopped", "interrupted"], "interrupted"),
        (["created", "launched", "failed", "launched", "resumed", "started"], "running"),
        (["created", "launched", "started", "failed"], "failed"),
    ],
)
def test_state_is_the_last_telling_event(events: list[str], expected: str) -> None:
    assert run_dir.state([{"event": event} for event in events]) == expected
