from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.supervise.devices import Devices
from launcher.supervise.stop_requests import StopRequests

Frozen = Callable[..., RunDir]
ACCELERATE = ("strategy=accelerate", "cluster.gpus_per_node=4", "supervise.elastic=true")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Write into it how many devices are sound."""
    return tmp_path / "sound"


def devices(run: RunDir) -> Devices:
    return Devices(run=run, requests=StopRequests(run=run))


def names(run: RunDir) -> list[str]:
    return [event["event"] for event in run.events()]


def test_a_start_waits_until_the_devices_are_there(frozen: Frozen, sound: Path, tmp_path: Path) -> None:
    sound.write_text("1")
    script = tmp_path / "health.sh"
    script.write_text(f"cat {sound}; echo 2 > {sound}")  # the next answer is another one
    run = frozen(f"supervise.health_command='sh {script}'")
    assert devices(run).prepare()
    assert names(run) == ["created", "paused"]
    assert run.plan().world_size == 2


def test_who_waits_can_be_stopped(frozen: Frozen, sound: Path) -> None:
    sound.write_text("0")
    run = frozen(f"supervise.health_command='cat {sound}'", "supervise.health_interval_s=600")
    threading.Timer(0.5, run.stop_file.touch).start()
    assert not devices(run).prepare()


def test_fewer_ranks_go_on_and_leave_when_the_devices_are_back(
    frozen: Frozen, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound.write_text("3")
    run = frozen(*ACCELERATE, f"supervise.health_command='cat {sound}'")
    before = run.plan()
    watcher = devices(run)
    assert watcher.prepare()
    assert run.plan().world_size == 2  # three do not divide the batch
    assert run.plan().global_batch_size == before.global_batch_size
    assert "3 of 4 devices can be used; going on with 2 ranks" in capsys.readouterr().err
    assert watcher.prepare()  # nothing changed, nothing is planned
    assert names(run) == ["created", "replanned"]
    watcher._asked = 0
    watcher.look()
    assert not run.leave_file.exists()
    sound.write_text("4")
    watcher._asked = 0
    watcher.look()
    assert run.leave_file.exists() and watcher.are_back
    assert not watcher.requests.asked(), "only a person asks for an end"
    assert watcher.prepare()
    assert not run.leave_file.exists() and not watcher.are_back
    assert run.plan() == before
    assert run.job().cluster.gpus_per_node == 4


def test_a_whole_run_is_not_asked_about(frozen: Frozen, sound: Path) -> None:
    sound.write_text("2")
    run = frozen(f"supervise.health_command='cat {sound}'")
    watcher = devices(run)
    assert watcher.prepare()
    sound.unlink()
    watcher._asked = 0
    watcher.look()  # would fail to find the file, and take the devices for lost
    assert watcher._asked == 0


def test_who_asks_for_an_end_meanwhile_is_heard(frozen: Frozen, sound: Path) -> None:
    sound.write_text("2")
    run = frozen(*ACCELERATE, f"supervise.health_command='cat {sound}'")
    watcher = devices(run)
    assert watcher.prepare()
    sound.write_text("4")
    watcher._asked = 0
    watcher.look()
    run.stop_file.touch()
    assert watcher.are_back
    assert not watcher.prepare()
    assert run.plan().world_size == 2


def test_a_command_that_fails_meanwhile_leaves_the_workers_alone(
    frozen: Frozen, sound: Path, tmp_path: Path
) -> None:
    sound.write_text("2")
    command = tmp_path / "health"
    command.write_text(f"#!/bin/sh\ncat {sound}\n")
    command.chmod(0o755)
    run = frozen(*ACCELERATE, f"supervise.health_command={command}")
    watcher = devices(run)
    assert watcher.prepare()
    command.unlink()
    watcher._asked = 0
    watcher.look()
    assert watcher._asked > 0 and not watcher.are_back


def test_an_engine_that_cannot_reshard_waits(frozen: Frozen, sound: Path) -> None:
    sound.write_text("1")
    run = frozen("supervise.elastic=true", f"supervise.health_command='cat {sound}'")
    watcher = devices(run)
    assert not watcher._fits(1)
    assert names(run) == ["created"]
