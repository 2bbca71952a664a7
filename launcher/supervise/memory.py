"""What the kernel tells about memory that ran out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_HOST = Path("/proc/vmstat")


def kills(own_group: Path = _OWN_GROUP, *, groups: Path = _GROUPS, host: Path = _HOST) -> int:
    """Return how many processes were killed for memory so far: of our control group, else of this host; else 0.

    On a host that is shared, a kill among somebody else's processes says nothing about ours. The workers are in our
    group, or below it.
    """
    counts = (_count(groups / path / "memory.events") for path in _unified(own_group))
    return next((count for count in (*counts, _count(host)) if count is not None), 0)


def _unified(own_group: Path) -> list[str]:
    """Our place in the unified hierarchy (cgroup v2), relative to its root; none without one."""
    with suppress(OSError, ValueError):
        lines = own_group.read_text(encoding="utf-8").splitlines()
        return [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return []


def _count(counters: Path) -> int | None:
    with suppress(OSError, ValueError):
        lines = counters.read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    return None
