from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import detect
from launcher.cluster.detect import DetectedGpu
from launcher.config import Job, SuperviseConfig
from launcher.errors import ConfigError
from launcher.preflight import gpus
from launcher.supervise import health


@pytest.fixture
def asking(small_job: Job, tmp_path: Path) -> Callable[[str], Job]:
    """A job of two devices with a health command that runs this code."""

    def build(code: str) -> Job:
        script = tmp_path / "health.py"
        script.write_text(code)
        return replace(small_job, supervise=SuperviseConfig(health_command=f"{sys.executable} {script}"))

    return build


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("print('looking around'); print(1)", 1),
        ("print('all is well')", 2),
        ("", 2),
        ("print(2); raise SystemExit(3)", 0),
    ],
)
def test_the_command_says_how_many_devices_are_sound(asking: Any, code: str, found: int) -> None:
    assert health.devices(asking(code)) == found


def test_a_command_that_is_none_is_a_fault_of_the_configuration(small_job: Job) -> None:
    job = replace(small_job, supervise=SuperviseConfig(health_command="/no/such/program --fast"))
    with pytest.raises(ConfigError, match=r"supervise\.health_command=/no/such/program --fast cannot be run"):
        health.devices(job)


def test_a_command_that_never_answers_speaks_for_no_device(
    asking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.2)
    assert health.devices(asking("import time; time.sleep(600)")) == 0


def test_processors_are_always_there(small_job: Job) -> None:
    assert health.devices(small_job) is None


def test_hidden_from_all_but_a_lost_device_there_is_none(
    small_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = DetectedGpu(index=0, uuid="GPU-1", name="NVIDIA H100 80GB HBM3", memory_gib=79.0)
    monkeypatch.setattr(detect, "_query_nvml", lambda: [left])
    on_device = replace(small_job.cluster, gpu=replace(small_job.cluster.gpu, device="cuda"))
    job = replace(small_job, cluster=on_device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert health.devices(job) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert health.devices(job) == 1


def test_sick_gpus_are_hidden_until_they_are_well(small_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        DetectedGpu(index=i, uuid=f"GPU-{i}", name="NVIDIA H100 80GB HBM3", memory_gib=79.0) for i in range(3)
    ]
    monkeypatch.setattr(detect, "_query_nvml", lambda: found)
    readings = [{"index": 1.0, "remap_pending": 1.0}, {"index": 2.0, "used_gib": 70.0}]
    monkeypatch.setattr(gpus, "readings", lambda: readings)
    on_device = replace(small_job.cluster, gpu=replace(small_job.cluster.gpu, device="cuda"))
    job = replace(small_job, cluster=on_device, submit=replace(small_job.submit, preflight=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1,0")
    assert health.devices(job, given="2,1,0") == 2, "memory in use is our own workers', now and then"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-0"
    readings.pop(0)
    assert health.devices(job, given="2,1,0") == 3
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,1,0"
    assert health.devices(replace(job, submit=small_job.submit)) == 3
