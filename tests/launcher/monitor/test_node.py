"""A node's hardware: processors and traffic as they are here, GPUs through a driver that answers as NVML does."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from launcher.monitor import node
from launcher.monitor.node import NodeSampler, merged, open_gpus


def test_a_sample_tells_this_node_and_grows_with_what_it_does(tmp_path: Path) -> None:
    sampler = NodeSampler(seconds=0.2)
    try:
        here = socket.gethostname()
        first = sampler.latest
        assert 0 < first["host_memory_gib"][here] < psutil.virtual_memory().total / 2**30
        assert "cpu_percent" not in first, "of no stretch of time"
        deadline = time.monotonic() + 20
        while sampler.latest is first and time.monotonic() < deadline:
            sum(range(1000))  # something to see
        assert sampler.latest is not first, "nobody looked again"
        assert 0 < sampler.latest["cpu_percent"][here] <= 100
        assert sampler.latest["network_sent_bytes"][here] >= first["network_sent_bytes"][here] >= 0
    finally:
        sampler.close()
    stopped = sampler.latest
    time.sleep(0.2)
    assert sampler.latest is stopped


def test_samples_of_nodes_become_one() -> None:
    both = merged([{"cpu_percent": {"a": 1.0}}, {}, {"cpu_percent": {"b": 2.0}, "gpu_power_w": {"b:0": 3.0}}])
    assert both == {"cpu_percent": {"a": 1.0, "b": 2.0}, "gpu_power_w": {"b:0": 3.0}}


def test_containers_may_hide_disks_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    assert node._traffic() == {}


class Driver:
    """Answers for two GPUs as NVML does; the second one is too old for most questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=90 + gpu),
            "nvmlDeviceGetPowerUsage": lambda gpu: self.modern(gpu, 412_500),
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 60 + gpu,
            "nvmlDeviceGetClockInfo": lambda gpu, kind: 1980,
            "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, counter: self.modern(gpu, 3),
            "nvmlDeviceGetFieldValues": lambda gpu, ids: [self.link(gpu, *asked) for asked in ids],
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    @staticmethod
    def modern(gpu: int, value: int) -> int:
        if gpu == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    @staticmethod
    def link(gpu: int, field: int, scope: int) -> SimpleNamespace:
        """One link tells a part of what all of them do, which is what UINT_MAX asks for."""
        kib = {
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 1000,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 24,
        }
        return Driver.field(gpu, kib[field] if scope == 0xFFFFFFFF else kib[field] // 18)

    @staticmethod
    def field(gpu: int, kib: int) -> SimpleNamespace:
        code = pynvml.NVML_ERROR_NOT_SUPPORTED if gpu == 1 else 0
        return SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(ullVal=kib))


def test_gpus_tell_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    first, second = (read() for read in open_gpus())
    assert first == {
        "gpu_percent": 90.0,
        "gpu_power_w": 412.5,
        "gpu_temperature_celsius": 60.0,
        "gpu_clock_mhz": 1980.0,
        "gpu_ecc_errors": 3.0,
        "gpu_nvlink_bytes": 1024.0**2,
    }
    assert second == {"gpu_percent": 91.0, "gpu_temperature_celsius": 61.0, "gpu_clock_mhz": 1980.0}


def test_a_lost_gpu_silences_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)

    def handle(index: int) -> int:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    first, second = (read() for read in open_gpus())
    assert first == {} and second["gpu_percent"] == 91.0


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert open_gpus() == []
