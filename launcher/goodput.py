"""Where a run's wall time went, over all its starts: pure functions of events.jsonl and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]

_ENDS = ("finished", "stopped", "failed", "interrupted")
_ASKED_FOR = ("finished", "stopped", "interrupted")  # by a person or a scheduler, who decides when it goes on
# What is done to a run while no worker lives: no sign that the start before it was still alive.
_BETWEEN = ("submitted", "replanned", "paused", "restarting", "remedied")


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Seconds of wall time since the run was created, split without rest."""

    productive_s: float  # steps that count, each once
    queue_s: float  # from creation to the first start
    init_s: float  # from a start to its first step: imports, weights, restoring
    stall_s: float  # training stood still for a checkpoint
    lost_s: float  # steps that were repeated, and what was under way when a start failed
    paused_s: float  # from an end that was asked for to the next start
    idle_s: float  # from any other end to the next start
    other_s: float  # around the steps: metrics, agreeing about stopping, leaving
    lost_steps: int
    num_starts: int

    @property
    def wall_s(self) -> float:
        """The sum of all parts."""
        return float(sum(getattr(self, f.name) for f in fields(self) if f.name.endswith("_s")))

    @property
    def waited_s(self) -> float:
        """What the run did not have its hardware for: a queue and pauses are nobody's fault in training."""
        return self.queue_s + self.paused_s

    @property
    def goodput(self) -> float:
        """Productive share of the wall time without waits, 0 to 1."""
        counted_s = self.wall_s - self.waited_s
        return self.productive_s / counted_s if counted_s > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """As plain data."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "wall_s": self.wall_s, "waited_s": self.waited_s, "goodput": self.goodput}


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the workers; `stepped` is None where it ended before its first step."""

    begun: float
    stepped: float | None
    ended: float
    end: str | None  # the event; None where nobody saw it, or it is to come


def ledger(events: Sequence[Record], metrics: Sequence[Record], *, now: float) -> Ledger | None:
    """Add up a run; None before its first start. A start without an end is under way and counted up to `now`."""
    own, marks = _own(events), _marks(events, metrics)
    starts = list(_starts(own, marks, now=now))
    if not starts:
        return None
    lost = [event for event in own if event["event"] == "lost"]
    saves = [event for event in own if event["event"] in ("checkpoint", "checkpoint_failed")]
    productive, stall = productive_s(metrics), sum(event["stall_s"] for event in saves)
    lost_s = sum(event["seconds"] for event in lost) + sum(_cut_off(start, marks) for start in starts)
    init = sum((start.ended if start.stepped is None else start.stepped) - start.begun for start in starts)
    running = sum(start.ended - start.begun for start in starts) - init
    gaps = [(before.end in _ASKED_FOR, after.begun - before.ended) for before, after in pairwise(starts)]
    return Ledger(
        productive_s=productive,
        queue_s=starts[0].begun - own[0]["time"],
        init_s=init,
        stall_s=stall,
        lost_s=lost_s,
        paused_s=sum(seconds for asked_for, seconds in gaps if asked_for),
        idle_s=sum(seconds for asked_for, seconds in gaps if not asked_for),
        other_s=running - productive - stall - lost_s,
        lost_steps=sum(event["steps"] for event in lost),
        num_starts=len(starts),
    )


def starts_of(events: Sequence[Record], metrics: Sequence[Record], *, now: float) -> list[Start]:
    """Return the starts of the workers, oldest first; one without an end is under way until `now`."""
    return list(_starts(_own(events), _marks(events, metrics), now=now))


def productive_s(metrics: Sequence[Record]) -> float:
    """Seconds of the steps that count so far."""
    return float(sum(record["step_time_s"] for record in metrics))


class Clock:
    """Goodput while training: productive seconds so far over the time since `begun`, as if no wait had been before."""

    def __init__(self, *, begun: float, productive_s: float) -> None:
        self._begun = begun
        self._productive_s = productive_s

    def tick(self, seconds: float, *, now: float) -> float:
        """Count a step; return the share."""
        self._productive_s += seconds
        return self._productive_s / max(now - self._begun, self._productive_s)


def clock(events: Sequence[Record], metrics: Sequence[Record], *, now: float) -> Clock | None:
    """Start to count where the steps in `metrics` end; None for a run without a start."""
    spent = ledger(events, metrics, now=now)
    if spent is None:
        return None
    return Clock(begun=events[0]["time"] + spent.waited_s, productive_s=spent.productive_s)


def lost(metrics: Sequence[Record], *, step: int) -> dict[str, Any] | None:
    """What a start at `step` has to repeat, as the event `lost`; None where it repeats nothing.

    `metrics` still holds the steps that are about to be taken back.
    """
    again = [record for record in metrics if record["step"] > step]
    if not again:
        return None
    return {"steps": len(again), "seconds": productive_s(again), "until": again[-1]["time"]}


def _own(events: Sequence[Record]) -> list[Record]:
    """Leave exports out, which are no part of the run."""
    return [event for event in events if not str(event["event"]).startswith("export")]


def _marks(events: Sequence[Record], metrics: Sequence[Record]) -> list[float]:
    return sorted([*(record["time"] for record in metrics), *_times(_own(events))])


def _times(events: Sequence[Record]) -> Iterator[float]:
    """When something was done: an end only says that it was over by then."""
    for event in events:
        if event["event"] == "lost":
            yield event["until"]
        elif event["event"] not in (*_ENDS, *_BETWEEN):
            yield event["time"]


def _starts(events: Sequence[Record], marks: Sequence[float], *, now: float) -> Iterator[Start]:
    begun: float | None = None
    stepped: float | None = None

    def closed(ended: float, *, end: str | None = None) -> Start:
        assert begun is not None
        return Start(begun=begun, stepped=stepped, ended=ended, end=end)

    first, earliest = True, events[0]["time"] if events else 0.0
    for event in events:
        name, moment = event["event"], event["time"]
        again = name == "started" and stepped is not None
        # A clock that was set back must not put a beginning before what came first.
        own = min(max(event.get("begun", moment), earliest), moment)
        if begun is not None and (name == "launched" or again):
            # Nobody saw the end of the one before: it was alive when it last did something.
            yield closed(max([begun, *(mark for mark in marks if mark < own)]))
            begun = stepped = None
        if name == "launched":
            begun, first = moment, False
        elif name == "started":
            # Bare torchrun says nothing before its workers do, and they say when they began (older ones did not).
            if begun is None:
                begun = earliest if first and "begun" not in event else own
            stepped, first = moment, False
        elif name in _ENDS and begun is not None:
            earliest = moment
            yield closed(moment, end=name)
            begun = stepped = None
    if begun is not None:
        yield closed(now)


def _cut_off(start: Start, marks: Sequence[float]) -> float:
    """From the last thing done to the end of a start that failed: a step cut off, or a hang until it was noticed."""
    if start.end != "failed" or start.stepped is None:
        return 0.0
    last = max((mark for mark in marks if start.begun <= mark <= start.ended), default=start.ended)
    return start.ended - last
