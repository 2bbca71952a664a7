"""A dated JSON record of one measurement: when, on what, of which commit, and the figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from launcher.cluster import detect
from launcher.decode import encode
from launcher.provenance import versions

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "benchmarks" / "records"


@dataclass(frozen=True, kw_only=True)
class Code:
    """The commit that was measured; `dirty`: with changes that no commit holds."""

    commit: str
    dirty: bool


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What was measured on. The load is the one-minute average per core when the record was written."""

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...]
    load_per_core: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement. It names no host and no path."""

    benchmark: str
    date: str  # UTC, ISO 8601
    code: Code
    hardware: Hardware
    versions: Mapping[str, str]
    command: str
    figures: Mapping[str, Any]


def create(benchmark: str, *, arguments: Sequence[str], figures: Mapping[str, Any]) -> Record:
    """Put the facts of this machine and this checkout around `figures`."""
    return Record(
        benchmark=benchmark,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        code=_code(),
        hardware=_hardware(),
        versions=versions(),
        command=" ".join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
        figures=figures,
    )


def write(record: Record, *, name: str, directory: Path = RECORDS) -> Path:
    """Write `record` as <date>-<name>.json and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromisoformat(record.date).strftime("%Y%m%d-%H%M%S")
    path = directory / f"{stamp}-{name}.json"
    path.write_text(json.dumps(encode(record), indent=2) + "\n", encoding="utf-8")
    return path


def _code() -> Code:
    # The record of the last measurement is no change of what is measured now.
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/records")
    return Code(commit=_git("rev-parse", "HEAD"), dirty=bool(status))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _hardware() -> Hardware:
    machine = detect.probe()
    return Hardware(
        cpu=_cpu_name(),
        cores=machine.num_cores,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=tuple(gpu.name for gpu in machine.gpus),
        load_per_core=round(os.getloadavg()[0] / machine.num_cores, 2),
    )


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
