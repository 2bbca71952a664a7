"""What the kernel tells about memory that ran out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_COUNTERS = Path("/proc/vmstat")


def kills(counters: Path = _COUNTERS) -> int:
    """Return how many processes this host has killed for memory since it was started; 0 where nobody counts."""
    with suppress(OSError, ValueError):
        lines = counters.read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0
