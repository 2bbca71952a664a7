"""What a profiler's trace says a step consists of: computing, communicating with nothing beside it, idling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STEP = "meshwright step "  # how the steps are marked in a trace
_MICROSECOND = 1e-6
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LIBRARIES = ("gloo:", "nccl:", "mpi:", "ucc:")

Interval = tuple[float, float]


def summarise(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return seconds of the mean step by part, and of communication by group and operation.

    On a GPU kernels count and nothing of the host. On a CPU operators do, and what the communication library's own
    threads mark. Sums of overlapping stretches count once, so `compute`, `exposed communication` and `idle` make up
    the step, and `communication` holds what computing hides as well.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    steps = _union(_interval(event) for event in whole if str(event["name"]).startswith(STEP))
    count = len({event["name"] for event in whole if str(event["name"]).startswith(STEP)})
    if not steps:
        raise ValueError("the trace holds no marked step")
    on_device = any(event.get("cat") == "kernel" for event in whole)
    working = [e for e in whole if e.get("cat") in _ON_DEVICE] if on_device else whole
    sent = [event for event in working if _communicates(event, on_device=on_device)]
    computed = [event for event in working if _computes(event, on_device=on_device)]
    communication = _within(_union(map(_interval, sent)), steps)
    compute = _within(_union(map(_interval, computed)), steps)
    busy = _union([*communication, *compute])
    seconds = {
        "step": _length(steps),
        "compute": _length(compute),
        "communication": _length(communication),
        "exposed communication": _length(busy) - _length(compute),
        "idle": _length(steps) - _length(busy),
    }
    return {
        **{part: value * _MICROSECOND / count for part, value in seconds.items()},
        "by operation": {name: value / count for name, value in _by_operation(sent, steps).items()},
    }


def _communicates(event: Mapping[str, Any], *, on_device: bool) -> bool:
    name = str(event["name"])
    if on_device:
        return name.startswith("nccl") or "Collective name" in event.get("args", {})
    return name.startswith(_LIBRARIES)


def _computes(event: Mapping[str, Any], *, on_device: bool) -> bool:
    if on_device:
        return not _communicates(event, on_device=True)
    # c10d:: operators only hand over to the library, or wait for it.
    return event.get("cat") == "cpu_op" and not str(event["name"]).startswith(("c10d::", *_LIBRARIES))


def _by_operation(events: Sequence[Mapping[str, Any]], steps: Sequence[Interval]) -> dict[str, float]:
    """Seconds by group, where the trace names it, and operation."""
    found: dict[str, list[Interval]] = {}
    for event in events:
        told = event.get("args", {})
        operation = told.get("Collective name") or str(event["name"])
        group = told.get("Process Group Description") or told.get("Process Group Name")
        found.setdefault(f"{group}: {operation}" if group else operation, []).append(_interval(event))
    return {
        name: _length(_within(_union(spans), steps)) * _MICROSECOND for name, spans in sorted(found.items())
    }


def _interval(event: Mapping[str, Any]) -> Interval:
    start = float(event["ts"])
    return start, start + float(event.get("dur", 0.0))


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge what overlaps, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _within(intervals: Sequence[Interval], windows: Sequence[Interval]) -> list[Interval]:
    """Cut merged intervals to merged windows."""
    found, place = [], 0
    for start, end in intervals:
        while place < len(windows) and windows[place][1] <= start:
            place += 1
        index = place
        while index < len(windows) and windows[index][0] < end:
            found.append((max(start, windows[index][0]), min(end, windows[index][1])))
            index += 1
    return found


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
