"""What a profiler's trace says a step consists of: computing, communicating with nothing beside it, idling."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.monitor.traces.groups import ASIDE, NAME

STEP = "meshwright step "  # how the steps are marked in a trace
_MICROSECOND = 1e-6
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_UNNAMED = "unnamed"  # where neither the library nor PyTorch's flight recorder tells
_UNDESCRIBED = ("", "undefined")
_LIBRARIES = ("gloo:", "nccl:", "mpi:", "ucc:")

Interval = tuple[float, float]


def summarise(events: Iterable[Mapping[str, Any]], *, groups: Mapping[str, str]) -> dict[str, Any]:
    """Return seconds of the mean step by part, and of communication by group and operation.

    `groups` says what process groups are called, by the name that events know them by; others keep their description.

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
    communicating = (event for event in working if _communicates(event, on_device=on_device))
    sent = [(group, event) for event in communicating if (group := _group(event, groups)) != ASIDE]
    computed = [event for event in working if _computes(event, on_device=on_device)]
    communication = _within(_union(_interval(event) for _, event in sent), steps)
    compute = _within(_union(map(_interval, computed)), steps)
    busy = _union([*communication, *compute])
    seconds = {
        "step": _length(steps),
        "compute": _length(compute),
        "communication": _length(communication),
        "exposed communication": _length(busy) - _length(compute),
        "idle": _length(steps) - _length(busy),
    }
    operations = [(_operation(event, group), event) for group, event in sent]
    return {
        **{part: value * _MICROSECOND / count for part, value in seconds.items()},
        "by operation": _seconds_by(operations, steps=steps, count=count),
        "by group": _seconds_by(sent, steps=steps, count=count),
    }


def figures(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the mean of the ranks says of a step, as metrics; a group counts for the ranks that are in it."""
    groups: dict[str, list[float]] = {}
    for rank in ranks:
        for group, seconds in rank["by group"].items():
            groups.setdefault(group, []).append(seconds)
    return {
        "communication_s": {group: statistics.mean(found) for group, found in sorted(groups.items())},
        "exposed_communication_s": statistics.mean(rank["exposed communication"] for rank in ranks),
        "idle_s": statistics.mean(rank["idle"] for rank in ranks),
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


def _seconds_by(
    events: Sequence[tuple[str, Mapping[str, Any]]], *, steps: Sequence[Interval], count: int
) -> dict[str, float]:
    """Seconds of a step by what events are called."""
    found: dict[str, list[Interval]] = {}
    for name, event in events:
        found.setdefault(name, []).append(_interval(event))
    return {
        name: _length(_within(_union(spans), steps)) * _MICROSECOND / count
        for name, spans in sorted(found.items())
    }


def _operation(event: Mapping[str, Any], group: str) -> str:
    name = str(event.get("args", {}).get("Collective name") or event["name"])
    return name if group == _UNNAMED else f"{group}: {name}"


def _group(event: Mapping[str, Any], groups: Mapping[str, str]) -> str:
    told = event.get("args", {})
    name, description = str(told.get(NAME, "")), str(told.get("Process Group Description", ""))
    if name in groups or description in _UNDESCRIBED:
        return groups.get(name) or name or _UNNAMED
    return description


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
