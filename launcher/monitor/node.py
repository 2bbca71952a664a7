"""What one node's hardware is doing: processors and traffic through psutil, GPUs through NVML. One sampler a node."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

_GIB = 2**30
_ALL_LINKS = 2**32 - 1  # as the scope of a counter of NVLink; without one NVML tells of link 0 alone (nvml.h)

# By metric, then by node or GPU.
Sample = dict[str, dict[str, float]]


class NodeSampler:
    """Measure in a thread, so that a slow driver call never lengthens a step; `latest` is what the step takes."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._node = socket.gethostname()
        self._gpus = open_gpus()
        self._start = _traffic()
        self._done = threading.Event()
        self.latest = self._measure()
        self._thread = threading.Thread(target=self._run, name="meshwright-node", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop measuring."""
        self._done.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        psutil.cpu_percent()  # the first answer that a thread gets is about nothing
        while not self._done.wait(self._seconds):
            self.latest = {"cpu_percent": {self._node: psutil.cpu_percent()}, **self._measure()}

    def _measure(self) -> Sample:
        now = _traffic()
        figures = {
            "host_memory_gib": psutil.virtual_memory().used / _GIB,
            **{name: now[name] - self._start[name] for name in now},
        }
        found: Sample = {name: {self._node: value} for name, value in figures.items()}
        for index, gpu in enumerate(self._gpus):
            for name, value in gpu().items():
                found.setdefault(name, {})[f"{self._node}:{index}"] = value
        return found


def merged(samples: list[Sample]) -> Sample:
    """Put the samples of several nodes into one."""
    found: Sample = {}
    for sample in samples:
        for name, values in sample.items():
            found.setdefault(name, {}).update(values)
    return found


def _traffic() -> dict[str, float]:
    network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
    found: dict[str, float] = {}
    if network is not None:
        found |= {"network_sent_bytes": network.bytes_sent, "network_received_bytes": network.bytes_recv}
    if disk is not None:  # containers may hide it
        found |= {"disk_read_bytes": disk.read_bytes, "disk_written_bytes": disk.write_bytes}
    return found


# What the driver is asked about one GPU, by name; made of its bindings and the GPU's handle.
Questions = Callable[[Any, Any], dict[str, Callable[[], float]]]


def open_gpus(questions: Questions | None = None) -> list[Callable[[], dict[str, float]]]:
    """Return what asks each GPU of this node; none where there is no NVIDIA driver or no package for it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception:  # NVMLError has no base of its own to name before the import
        return []
    return [_reader(pynvml, _asked_of(pynvml, index, questions or _figures)) for index in range(count)]


def _asked_of(nvml: Any, index: int, questions: Questions) -> dict[str, Callable[[], float]]:
    """Return what one GPU is asked: nothing where it is lost to this host, whose others answer all the same."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return {}
    return questions(nvml, handle)


def _figures(nvml: Any, handle: Any) -> dict[str, Callable[[], float]]:
    return {
        "gpu_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "gpu_temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "gpu_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "gpu_ecc_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "gpu_nvlink_bytes": lambda: _nvlink_bytes(nvml, handle),
    }


def _reader(nvml: Any, questions: dict[str, Callable[[], float]]) -> Callable[[], dict[str, float]]:
    """Return what puts the questions; what a card does not tell is left out."""

    def read() -> dict[str, float]:
        found = {}
        for name, ask in questions.items():
            with suppress(nvml.NVMLError):
                found[name] = float(ask())
        return found

    return read


def _nvlink_bytes(nvml: Any, handle: Any) -> float:
    """Sum of both directions over all links; the driver counts KiB."""
    both = [nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX]
    values = nvml.nvmlDeviceGetFieldValues(handle, [(field, _ALL_LINKS) for field in both])
    refused = next((value.nvmlReturn for value in values if value.nvmlReturn), None)
    if refused is not None:
        raise nvml.NVMLError(refused)
    return 1024.0 * sum(float(value.value.ullVal) for value in values)
