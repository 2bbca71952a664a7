"""What the driver says of the health of this node's GPUs, in the words of a person."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from launcher.cluster import detect
from launcher.config import PreflightConfig
from launcher.monitor.node import open_gpus

_GIB = 2**30
# Clocks that the hardware or heat holds down (NVML API reference, nvmlClocksEventReasons). A power cap, an idle GPU
# and clocks that somebody has set are no fault.
_SLOWDOWNS = {
    0x08: "the hardware slows it down",
    0x20: "software slows it down, it is too hot",
    0x40: "the hardware slows it down, it is too hot",
    0x80: "the power supply holds it down",
}


def readings() -> list[dict[str, float]]:
    """Return what the driver tells of each visible GPU; what one does not tell is left out."""
    visible = {gpu.index for gpu in detect.visible_gpus()}
    return [found for read in open_gpus(_health) if (found := read()).get("index") in visible]


def _health(nvml: Any, handle: Any) -> dict[str, Callable[[], float]]:
    return {
        "index": lambda: nvml.nvmlDeviceGetIndex(handle),
        "used_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used / _GIB,
        "ecc_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        # Corrected rows, uncorrected ones, whether some wait for a reset, whether some could not be replaced.
        "remap_pending": lambda: nvml.nvmlDeviceGetRemappedRows(handle)[2],
        "remap_failed": lambda: nvml.nvmlDeviceGetRemappedRows(handle)[3],
        "retirement_pending": lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle),
        "slowdown": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    }


def fault(reading: Mapping[str, float], bounds: PreflightConfig) -> str | None:
    """Return what keeps a run off one GPU; None: nothing that the driver would tell."""
    used = reading.get("used_gib", -math.inf)
    if used > bounds.max_gpu_used_gib:
        return (
            f"{used:.1f} GiB of its memory are taken, preflight.max_gpu_used_gib={bounds.max_gpu_used_gib:g} are "
            "allowed; end the processes on it"
        )
    return sickness(reading)


def sickness(reading: Mapping[str, float]) -> str | None:
    """Return what is wrong with one GPU itself, whoever uses it."""
    if reading.get("remap_failed"):
        return "a bad row of its memory could not be replaced (Xid 64); have the board exchanged"
    if reading.get("remap_pending") or reading.get("retirement_pending"):
        return "bad memory waits to be replaced (Xid 63); reset the GPU or restart the node"
    if reading.get("ecc_errors"):
        return f"{reading['ecc_errors']:.0f} uncorrected memory errors since the driver was loaded; reset the GPU"
    slowdown = int(reading.get("slowdown", 0))
    for bit, sentence in _SLOWDOWNS.items():
        if slowdown & bit:
            return f"{sentence} before any work; look at cooling and power"
    return None


def driver_versions() -> dict[str, str]:
    """Return the versions of the driver and of the CUDA that it brings; none without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        driver = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # NVMLError has no base of its own to name before the import
        return {}
    text = driver.decode() if isinstance(driver, bytes) else str(driver)
    return {"driver": text, "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}"}
