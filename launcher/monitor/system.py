"""Peak memory of this process: from the system, or from whoever owns its device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

_GIB = 2**30


def peak_memory_gib(device_peak_bytes: Callable[[], int] | None = None) -> float:
    """Return the peak that a plan's prediction is compared with: device memory, or the process' own on CPU.

    The worker passes its device's peak counter, so that no framework is imported here.
    """
    return (_host_peak_bytes() if device_peak_bytes is None else device_peak_bytes()) / _GIB


def _host_peak_bytes() -> int:
    # On Linux ru_maxrss survives exec: a small worker would report the peak of the launcher that forked it.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
