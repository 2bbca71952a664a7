"""What one node shows without the others: GPUs, versions, memory, disks, ports of its network cards; each in bounds."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from launcher import __version__
from launcher.cluster import detect
from launcher.preflight import gpus

T = TypeVar("T")
_PORTS = Path("/sys/class/infiniband")
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A folder that a run writes to, and the room on its disk."""

    path: str
    use: str
    free_gib: float = 0.0
    free_inodes: int | None = None  # None: the file system counts none
    fault: str | None = None  # why nothing can be written there


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port of an InfiniBand or RoCE card, as the kernel describes it."""

    name: str  # mlx5_0/1
    state: str  # ACTIVE, DOWN, INIT, ARMED
    physical: str  # LinkUp, Disabled, Polling
    rate: str  # 400 Gb/sec (4X NDR)
    layer: str  # InfiniBand, Ethernet


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node as it shows itself; `silent` says why what is None gave no answer."""

    host: str
    gpu_names: tuple[str, ...] | None = None
    gpu_readings: tuple[Mapping[str, float], ...] | None = None
    versions: Mapping[str, str] | None = None
    memory_gib: float | None = None  # that is free
    volumes: tuple[Volume, ...] | None = None
    ports: tuple[Port, ...] | None = None
    silent: Mapping[str, str] = field(default_factory=dict)


def look(*, host: str, folders: Mapping[str, Path], timeout_s: float) -> NodeFacts:
    """Look at this node, at all of it at once; `folders` are those that a run writes to, by what for.

    A look that hangs, as one at a dead disk or driver does, is left behind after `timeout_s`.
    """
    looks: dict[str, Callable[[], Any]] = {
        "gpu_names": lambda: tuple(gpu.name for gpu in detect.visible_gpus()),
        "gpu_readings": lambda: tuple(gpus.readings()),
        "versions": versions,
        "memory_gib": lambda: detect.free_memory_bytes() / _GIB,
        "volumes": lambda: tuple(volume(path, use=use) for use, path in folders.items()),
        "ports": lambda: read_ports(_PORTS),
    }
    found, faults = _at_once(looks, timeout_s=timeout_s)
    late = f"no answer within {timeout_s:g} s"
    silent = {name: faults.get(name, late) for name in looks if name not in found}
    return NodeFacts(host=host, **found, silent=silent)


def _at_once(
    looks: Mapping[str, Callable[[], T]], *, timeout_s: float
) -> tuple[dict[str, T], dict[str, str]]:
    """Return answers and faults by name; what is in neither is still looking."""
    found: dict[str, T] = {}
    faults: dict[str, str] = {}

    def run(name: str, ask: Callable[[], T]) -> None:
        try:
            found[name] = ask()
        except Exception as error:  # whatever a driver or a disk comes up with is for the verdict to tell
            faults[name] = f"{type(error).__name__}: {error}"

    # Not a pool: its threads would hold up the end of the process.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in looks.items()]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found), dict(faults)


def versions() -> dict[str, str]:
    """Return what has to be equal on all nodes, as far as no framework is needed to ask."""
    return {"meshwright": __version__, "python": platform.python_version(), **gpus.driver_versions()}


def volume(path: Path, *, use: str) -> Volume:
    """Ask for the room in a folder, and try to write there."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        room = os.statvfs(path)
    except OSError as error:
        return Volume(path=str(path), use=use, fault=error.strerror or type(error).__name__)
    return Volume(
        path=str(path),
        use=use,
        free_gib=room.f_bavail * room.f_frsize / _GIB,
        free_inodes=room.f_favail if room.f_files else None,
    )


def read_ports(folder: Path) -> tuple[Port, ...]:
    """Read the ports under /sys/class/infiniband; none where there are no such cards."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        state, physical, rate, layer = _lines(port, ("state", "phys_state", "rate", "link_layer"))
        found.append(
            Port(
                name=f"{port.parent.parent.name}/{port.name}",
                state=state.rpartition(":")[2].strip(),  # "4: ACTIVE"
                physical=physical.rpartition(":")[2].strip(),
                rate=rate,
                layer=layer,
            )
        )
    return tuple(found)


def _lines(folder: Path, names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append((folder / name).read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            found.append("")
    return found
