"""Restarts, checkpoints and failures, read from the run's events as they grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.files import read_records, records

OUT_OF_MEMORY, BAD_LOSS, LOST_RANK, FAILED = "out_of_memory", "bad_loss", "lost_rank", "failed"


def cause_of(event: Mapping[str, Any]) -> str:
    """Return the word for why a run failed: the event's own, else what its type and message tell."""
    if isinstance(event.get("cause"), str):
        return str(event["cause"])
    message = str(event.get("message", ""))
    if (
        event.get("type") == "DeviceMemoryError" or "can't allocate memory" in message
    ):  # as PyTorch says on a CPU
        return OUT_OF_MEMORY
    if "loss of step" in message:
        return BAD_LOSS
    return LOST_RANK if " was killed by " in message else FAILED


def replanned_at(events_file: Path) -> float:
    """Return when the present plan took the place of another one; 0 where it is the first."""
    events = read_records(events_file)
    return max((event["time"] for event in events if event["event"] == "replanned"), default=0.0)


class Reliability:
    """What the events tell so far. `update` reads only what is new."""

    def __init__(self, events_file: Path) -> None:
        self._file = events_file
        self._offset = 0
        self._first: float | None = None
        self._starts = 0
        self._checkpoint: float | None = None
        self._is_paused = False
        self._resumed = 0.0  # behind a pause that somebody asked for, in which nothing was at risk
        self._stall_s: float | None = None
        self._failures: dict[str, float] = {}

    def update(self, *, now: float) -> dict[str, Any]:
        """Return the metrics at `now`."""
        for event in self._new():
            self._take(event)
        first = now if self._first is None else self._first
        since = max(self._resumed, first if self._checkpoint is None else self._checkpoint)
        found: dict[str, Any] = {"restarts": max(0, self._starts - 1), "checkpoint_age_s": now - since}
        if self._stall_s is not None:
            found["checkpoint_stall_s"] = self._stall_s
        if self._failures:
            found["last_failure_time_s"] = dict(self._failures)
        return found

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, moment = event["event"], float(event["time"])
        if self._first is None and kind in ("launched", "started"):
            self._first = moment
        if kind == "started":
            self._starts += 1
            self._resumed = moment if self._is_paused else self._resumed
            self._is_paused = False
        elif kind == "checkpoint":
            self._checkpoint, self._stall_s = moment, event.get("stall_s")
        elif kind in ("stopped", "interrupted"):
            self._is_paused = True
        elif kind == "failed":
            self._failures[cause_of(event)] = moment

    def _new(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(records(whole.decode("utf-8", errors="replace")))
