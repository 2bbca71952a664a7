"""Signs of life: each rank keeps in a small file of its own where it stands; whoever supervises looks at it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.decode import decode, encode
from launcher.errors import ConfigError

# `warming` is the first step of a process: kernels are compiled and connections opened in it.
Phase = Literal["starting", "warming", "evaluating", "saving", "stepping", "leaving"]
_WIDTH = 512  # bytes; a beat always overwrites all of the one before


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where one rank stands."""

    rank: int
    host: str
    pid: int
    phase: Phase
    step: int  # steps completed
    count: int  # beats so far, so that the next one differs


class Heart:
    """Writes the beats of this process: one small write in place, no thread, nothing to flush."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._rank, self._count, self._host = rank, 0, socket.gethostname()
        self._descriptor: int | None = None
        with suppress(OSError):  # a full disk: whoever looks sees a rank that has not reported
            folder.mkdir(exist_ok=True)
            self._descriptor = os.open(file_of(folder, rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.beat("starting", 0)

    def beat(self, phase: Phase, step: int) -> None:
        """Tell that this rank goes on; called where a rank may get stuck next."""
        self._count += 1
        beat = Beat(
            rank=self._rank, host=self._host, pid=os.getpid(), phase=phase, step=step, count=self._count
        )
        text = json.dumps(encode(beat)).ljust(_WIDTH - 1) + "\n"
        if self._descriptor is not None:
            with suppress(OSError):
                os.pwrite(self._descriptor, text.encode(), 0)


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank keeps its beat."""
    return folder / f"rank_{rank:05d}.json"


def read(folder: Path, rank: int) -> Beat | None:
    """Return the last beat of a rank; None before its first one."""
    with suppress(OSError, ValueError, ConfigError):  # torn by a write at this moment: the next look is whole
        return decode(Beat, json.loads(file_of(folder, rank).read_text(encoding="utf-8")))
    return None


def read_all(folder: Path, *, world_size: int) -> Iterator[Beat]:
    """Yield the last beat of every rank that has reported."""
    found = (read(folder, rank) for rank in range(world_size))
    return (beat for beat in found if beat is not None)
