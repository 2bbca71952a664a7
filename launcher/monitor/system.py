"""Memory of this process: host bytes from the system, device bytes from whoever owns the device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Resident host memory of this process and, where there is a device, the peak allocated on it."""

    host_gib: float
    host_peak_gib: float
    device_peak_gib: float | None = None  # None: computing on the CPU

    @property
    def peak_gib(self) -> float:
        """The peak that a plan's prediction is compared with: device memory, or the process' own on CPU."""
        return self.host_peak_gib if self.device_peak_gib is None else self.device_peak_gib


def read_memory(device_peak_bytes: Callable[[], int] | None = None) -> MemoryReading:
    """Measure now. The worker passes its device's peak counter, so that no framework is imported here."""
    return MemoryReading(
        host_gib=psutil.Process().memory_info().rss / _GIB,
        host_peak_gib=_host_peak_bytes() / _GIB,
        device_peak_gib=None if device_peak_bytes is None else device_peak_bytes() / _GIB,
    )


def _host_peak_bytes() -> int:
    # On Linux ru_maxrss survives exec: a small worker would report the peak of the launcher that forked it.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
