"""What the events tell, as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.reliability import Reliability, cause_of


def write(file: Path, *events: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(event) + "\n" for event in events)


def test_restarts_and_checkpoints_follow_the_events(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    told = Reliability(file)
    assert told.update(now=100.0) == {"restarts": 0, "checkpoint_age_s": 0.0}
    write(
        file,
        {"time": 90.0, "event": "created"},
        {"time": 100.0, "event": "launched"},
        {"time": 110.0, "event": "started"},
    )
    assert told.update(now=120.0) == {
        "restarts": 0,
        "checkpoint_age_s": 20.0,
    }
    write(
        file,
        {"time": 130.0, "event": "checkpoint", "step": 4, "seconds": 9.0, "stall_s": 2.5},
        {"time": 140.0, "event": "failed", "type": "DeviceMemoryError", "message": "out of memory"},
        {"time": 150.0, "event": "started"},
    )
    assert told.update(now=200.0) == {
        "restarts": 1,
        "checkpoint_age_s": 70.0,
        "checkpoint_stall_s": 2.5,
        "last_failure_time_s": {"out_of_memory": 140.0},
    }


@pytest.mark.parametrize(("end", "age_s"), [("stopped", 10.0), ("interrupted", 10.0), ("failed", 9_970.0)])
def test_nothing_is_at_risk_while_a_run_pauses(tmp_path: Path, end: str, age_s: float) -> None:
    file = tmp_path / "events.jsonl"
    write(
        file,
        {"time": 10.0, "event": "started"},
        {"time": 30.0, "event": "checkpoint", "stall_s": 1.0},
        {"time": 31.0, "event": end},
        {"time": 9_980.0, "event": "launched"},
        {"time": 9_990.0, "event": "started"},
    )
    assert Reliability(file).update(now=10_000.0)["checkpoint_age_s"] == age_s


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    told = Reliability(file)
    line = json.dumps({"time": 1.0, "event": "started"}) + "\n"
    file.write_text(line + line[:9])
    told.update(now=2.0)
    with file.open("a") as stream:
        stream.write(line[9:])
    assert told.update(now=3.0)["restarts"] == 1


@pytest.mark.parametrize(
    ("event", "cause"),
    [
        ({"type": "DeviceMemoryError", "message": "out of memory: 3 GiB"}, "out_of_memory"),
        ({"type": "TrainingError", "message": "DefaultCPUAllocator: can't allocate memory"}, "out_of_memory"),
        ({"type": "TrainingError", "message": "the loss of step 6 is nan; the last"}, "bad_loss"),
        ({"type": "TrainingError", "message": "rank 1 was killed by SIGKILL; the"}, "lost_rank"),
        ({"type": "RunDirError", "message": "no space is left"}, "failed"),
        ({"type": "TrainingError", "message": "x", "cause": "hang"}, "hang"),
    ],
)
def test_a_failure_has_a_cause(event: dict[str, str], cause: str) -> None:
    assert cause_of(event) == cause


def test_a_line_that_a_full_disk_has_torn_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"time": 90.0, "eve\n')
    write(file, {"time": 100.0, "event": "started"}, {"time": 110.0, "event": "started"})
    assert Reliability(file).update(now=120.0)["restarts"] == 1
