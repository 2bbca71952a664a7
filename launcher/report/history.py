"""Where the time of a run went, from its events: starting, steps that count, steps that were lost, saving, down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from launcher.goodput import Start, starts_of
from launcher.report.markup import box, label, legend, line, picture, table, tag, ticks
from launcher.report.style import hue

STARTING, STEPS, SAVING, LOST, DOWN = "starting", "steps that count", "saving", "lost steps", "not running"
KINDS = (STEPS, STARTING, SAVING, LOST, DOWN)
_ENDS = ("failed", "finished", "stopped", "interrupted")
_LEFT, _TOP, _ROW, _REACH = 108.0, 26.0, 34.0, 640.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a run's life, in seconds since its workers first began."""

    kind: str
    start_s: float
    end_s: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


def spans_of(
    events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]] = ()
) -> tuple[Span, ...]:
    """Return the stretches from the first start of the workers on, to the last thing heard of the run."""
    last = max((float(told["time"]) for told in (*events, *records)), default=0.0)
    starts = starts_of(events, records, now=last)
    found: list[Span] = []
    for start, after in zip(starts, [*starts[1:], None], strict=False):
        until = last if after is None else after.begun
        of_start = [event for event in events if start.begun <= event["time"] <= until]
        lost = start.end == "failed" or (after is not None and _repeats(events, after))
        found += _of_start(start, of_start, lost=lost)
        if after is not None:
            found.append(Span(kind=DOWN, start_s=start.ended, end_s=after.begun))
    first = starts[0].begun if starts else 0.0
    return tuple(
        replace(span, start_s=span.start_s - first, end_s=span.end_s - first)
        for span in found
        if span.end_s > span.start_s
    )


def _repeats(events: Sequence[Mapping[str, Any]], start: Start) -> bool:
    """Tell whether a start began with steps that the one before it had made."""
    return any(
        event["event"] == "lost" and start.begun <= event["time"] <= (start.stepped or start.ended)
        for event in events
    )


def _of_start(start: Start, events: Sequence[Mapping[str, Any]], *, lost: bool) -> Iterator[Span]:
    """Yield the stretches of one start; what lies behind its last checkpoint is lost where a failure took it."""
    stepped = start.ended if start.stepped is None else start.stepped
    yield Span(kind=STARTING, start_s=start.begun, end_s=stepped)
    since = stepped
    for event in events:
        if event["event"] == "checkpoint" and stepped < event["time"] <= start.ended:
            saved_from = max(since, event["time"] - float(event.get("stall_s") or 0.0))
            yield Span(kind=STEPS, start_s=since, end_s=saved_from)
            since = float(event["time"])
            yield Span(
                kind=SAVING, start_s=saved_from, end_s=since, note=f"checkpoint of step {event.get('step')}"
            )
    end = next((e for e in events if e["event"] in _ENDS and e["time"] == start.ended), {})
    note = str(end.get("message", end.get("event", "")))
    yield Span(kind=LOST if lost else STEPS, start_s=since, end_s=start.ended, note=note)


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
