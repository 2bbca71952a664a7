"""Where the time of a run went, from its events: starting, steps that count, steps that were lost, saving, down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from launcher.report.markup import box, label, legend, line, picture, table, tag, ticks
from launcher.report.style import hue

STARTING, STEPS, SAVING, LOST, DOWN = "starting", "steps that count", "saving", "lost steps", "not running"
KINDS = (STEPS, STARTING, SAVING, LOST, DOWN)
_ENDS = ("failed", "finished", "stopped", "interrupted", "restarting")
_LEFT, _TOP, _ROW, _REACH = 108.0, 26.0, 34.0, 640.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a run's life, in seconds since its first launch."""

    kind: str
    start_s: float
    end_s: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


class _Reader:
    """Walks through events once; what a stretch was is known only at its end."""

    def __init__(self, first: float) -> None:
        self.spans: list[Span] = []
        self._first = first
        self._state = DOWN
        self._since = first

    def take(self, event: Mapping[str, Any]) -> None:
        kind, now = event["event"], float(event["time"])
        if kind == "launched":
            self._close(now, then=STARTING)
        elif kind == "started":
            self._close(now, then=STEPS)
        elif kind == "checkpoint" and self._state == STEPS:
            saved_from = max(self._since, now - float(event.get("stall_s") or 0.0))
            self._close(saved_from, then=SAVING)
            self._close(now, then=STEPS, note=f"checkpoint of step {event.get('step')}")
        elif kind in _ENDS:
            if kind == "failed" and self._state == STEPS:
                self._state = LOST
            self._close(now, then=DOWN, note=str(event.get("message", kind)))

    def end(self, now: float) -> None:
        if self._state != DOWN:
            self._close(now, then=DOWN)

    def _close(self, now: float, *, then: str, note: str = "") -> None:
        now = max(now, self._since)
        if now > self._since:
            self.spans.append(
                Span(kind=self._state, start_s=self._since - self._first, end_s=now - self._first, note=note)
            )
        self._state, self._since = then, now


def spans_of(events: Sequence[Mapping[str, Any]], *, last: float | None) -> tuple[Span, ...]:
    """Return the stretches from the first launch on; `last` is when the run was last heard of."""
    told = sorted(
        (e for e in events if e["event"] in ("launched", "started", "checkpoint", *_ENDS)),
        key=lambda e: e["time"],
    )
    if not told:
        return ()
    reader = _Reader(float(told[0]["time"]))
    for event in told:
        reader.take(event)
    reader.end(max(float(told[-1]["time"]), last or 0.0))
    return tuple(reader.spans)


def seconds_by_kind(spans: Sequence[Span]) -> dict[str, float]:
    """Sum up the stretches."""
    return {kind: sum(span.seconds for span in spans if span.kind == kind) for kind in KINDS}


def history_chart(runs: Sequence[tuple[str, Sequence[Span]]]) -> str:
    """Draw one lane a run, and the same figures as a table."""
    shown = [(name, spans) for name, spans in runs if spans]
    if not shown:
        return ""
    end = max(spans[-1].end_s for _, spans in shown)
    bottom = _TOP + _ROW * len(shown)
    drawn = []
    for value in ticks(end, count=6):
        x = _LEFT + value / end * _REACH
        drawn.append(line(x1=x, y1=_TOP - 6, x2=x, y2=bottom, kind="grid"))
        drawn.append(label(f"{value:g} s", x=x, y=_TOP - 11, anchor="middle", kind="label-faint"))
    for row, (name, spans) in enumerate(shown):
        drawn.append(label(_cut(name), x=_LEFT - 8, y=_TOP + row * _ROW + 21, anchor="end"))
        for span in _drawable(spans, end):
            told = f"{span.kind}, {span.seconds:.1f} s" + (f": {span.note}" if span.note else "")
            drawn.append(
                box(
                    x=_LEFT + span.start_s / end * _REACH,
                    y=_TOP + row * _ROW + 4,
                    width=span.seconds / end * _REACH,
                    height=_ROW - 10,
                    kind=hue(KINDS.index(span.kind)),
                    title=told,
                )
            )
    used = [kind for kind in KINDS if any(span.kind == kind for _, spans in shown for span in spans)]
    svg = picture(
        *drawn,
        name="history",
        title="Where the time went",
        description=f"Lanes are runs, from their first launch over {end:.0f} s.",
        width=_LEFT + _REACH + 20,
        height=bottom + 8,
    )
    return legend((hue(KINDS.index(kind)), kind) for kind in used) + svg + _table(shown)


def _drawable(spans: Sequence[Span], end: float) -> list[Span]:
    """Leave out what is thinner than a third of a pixel, and let its neighbours meet."""
    wide = [span for span in spans if span.seconds / end * _REACH >= 0.33]
    joined: list[Span] = []
    for _, group in groupby(wide, key=lambda span: span.kind):
        first, *others = list(group)
        last = others[-1] if others else first
        joined.append(Span(kind=first.kind, start_s=first.start_s, end_s=last.end_s, note=last.note))
    return joined


def _table(runs: Sequence[tuple[str, Sequence[Span]]]) -> str:
    rows = []
    for name, spans in runs:
        seconds = seconds_by_kind(spans)
        whole = sum(seconds.values()) or 1.0
        cells = [f"{value:.1f} s, {100 * value / whole:.0f}%" for value in seconds.values()]
        rows.append((name, *cells))
    figures = table(
        ("run", *KINDS), rows, caption="Seconds and shares; lost steps were made again after a failure"
    )
    return tag("div", figures)


def _cut(name: str, most: int = 15) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
