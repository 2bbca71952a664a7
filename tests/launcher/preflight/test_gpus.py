from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from launcher.config import PreflightConfig
from launcher.preflight import gpus

BOUNDS = PreflightConfig()


def test_sound_gpus_tell_what_they_can(driver: SimpleNamespace) -> None:
    first, second = gpus.readings()
    assert first == {
        **{"index": 0, "used_gib": 0.5, "ecc_errors": 0, "remap_pending": 0, "remap_failed": 0, "slowdown": 4}
    }
    assert second == {"index": 1, "used_gib": 0.5, "retirement_pending": 0, "slowdown": 4}
    assert gpus.fault(first, BOUNDS) is gpus.fault(second, BOUNDS) is None


def test_hidden_gpus_are_not_asked(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [reading["index"] for reading in gpus.readings()] == [1]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rows", (0, 0, 1, 0), r"bad memory waits to be replaced \(Xid 63\)"),
        ("rows", (0, 2, 0, 1), r"could not be replaced \(Xid 64\); have the board exchanged"),
        ("errors", 3, "3 uncorrected memory errors since the driver was loaded"),
        ("reasons", 0x40 | 0x4, "the hardware slows it down, it is too hot before any work"),
        ("reasons", 0x80, "the power supply holds it down"),
    ],
)
def test_what_the_driver_knows_is_said(driver: SimpleNamespace, key: str, value: Any, sentence: str) -> None:
    setattr(driver, key, value)
    told = gpus.fault(gpus.readings()[0], BOUNDS)
    assert told is not None and re.search(sentence, told)


def test_memory_that_somebody_else_holds(driver: SimpleNamespace) -> None:
    told = gpus.fault({"index": 0, "used_gib": 31.0}, BOUNDS)
    assert told is not None and "31.0 GiB of its memory are taken, preflight.max_gpu_used_gib=2" in told


def test_versions_of_the_driver(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.driver_versions() == {"driver": "570.124.06", "driver_cuda": "12.8"}

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert gpus.driver_versions() == {} and gpus.readings() == []
