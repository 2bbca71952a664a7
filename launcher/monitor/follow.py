"""metrics.jsonl as it grows, for eyes that look again and again: a look costs what is new since the last one."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from launcher.errors import RunDirError
from launcher.monitor.metrics import parse

_RECENT = 20


class Followed:
    """Keeps some metrics of all steps, and the newest value of each one; damaged lines are left out."""

    def __init__(self, path: Path, *, kept: Iterable[str]) -> None:
        self._path, self._kept = path, tuple(kept)
        self._file_id: int | None = None
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self.curves: dict[str, list[float]] = {name: [] for name in self._kept}  # finite ones
        self.newest: dict[str, Any] = {}
        self.recent_s: deque[float] = deque(maxlen=_RECENT)  # step times

    def update(self) -> None:
        """Take in what was written since the last time; a restart that took steps back put another file there."""
        try:
            with self._path.open("rb") as file:
                self._read(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunDirError(f"{self._path} cannot be read: {error.strerror}") from error

    def _read(self, file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        if found.st_ino != self._file_id or found.st_size < self._offset:
            self._file_id = found.st_ino
            self._begin()
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # the rest of it comes
            self._offset += len(line)
            record = parse(line.decode("utf-8", errors="replace"))
            if record is not None:
                self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        self.newest |= record
        if "step_time_s" in record:
            self.recent_s.append(record["step_time_s"])
        for name, values in self.curves.items():
            value = record.get(name)
            if value is not None and math.isfinite(value):
                values.append(value)
