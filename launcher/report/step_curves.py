"""Curves over steps: one chart a metric, all runs on top of each other."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launcher.report.markup import label, line, picture, tag, text, ticks
from launcher.report.style import hue

MOST_POINTS = 400  # of one curve; more are averaged
_LEFT, _TOP, _WIDTH, _HEIGHT = 62.0, 12.0, 372.0, 190.0
_LETTERS = 7  # of a number that fits there
_DASHES = {"solid": "", "dashed": "7 4", "dotted": "2 3", "dash-dotted": "9 3 2 3"}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its name, the place of its run among the runs, and (x, y) points in order of x.

    `label` is what tells it from other curves of its run.
    """

    name: str
    run: int
    points: tuple[tuple[float, float], ...]
    dash: int = 0
    label: str = ""

    def thinned(self) -> Curve:
        """Return the curve with few enough points to draw, and none that is no number."""
        finite = [(x, y) for x, y in self.points if math.isfinite(y)]
        size = -(-len(finite) // MOST_POINTS) or 1
        groups = [finite[i : i + size] for i in range(0, len(finite), size)]
        means = tuple((statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups)
        return replace(self, points=means)


def chart(
    curves: Sequence[Curve],
    *,
    name: str,
    title: str,
    unit: str,
    across: str = "step",
    limit: float | None = None,
) -> str:
    """Draw curves with one axis each way; nothing where no curve has a point. `name` is the picture's id."""
    drawn = [c for c in (one.thinned() for one in bundled(curves)) if c.points]
    if not drawn:
        return ""
    xs, ys = [x for c in drawn for x, _ in c.points], [y for c in drawn for _, y in c.points]
    low, high = _range([*ys, *([limit] if limit is not None else [])])
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    inside: list[str] = [*_axes(left, right, low, high, across)]
    for one in drawn:
        steps = [
            f"{_LEFT + (x - left) / (right - left) * _WIDTH:.1f} {_TOP + (high - y) / (high - low) * _HEIGHT:.1f}"
            for x, y in one.points
        ]
        # A path of one point draws nothing; doubled with round ends it is a dot.
        path = "M" + "L".join(steps if len(steps) > 1 else steps * 2)
        inside.append(
            tag(
                "path",
                tag("title", text(f"{one.name}: last {one.points[-1][1]:.4g} {unit}")),
                d=path,
                class_=f"curve {hue(one.run)}",
                stroke_width=2,
                stroke_dasharray=_DASHES[_dash(one)] or "none",
                stroke_linecap="round",
            )
        )
    if limit is not None:
        y = _TOP + (high - limit) / (high - low) * _HEIGHT
        inside.append(line(x1=_LEFT, y1=y, x2=_LEFT + _WIDTH, y2=y, kind="limit"))
    told = "; ".join(f"{c.name} ends at {c.points[-1][1]:.4g} {unit}".rstrip() for c in drawn)
    svg = picture(
        *inside,
        name=name,
        title=title,
        description=f"{told}.",
        width=_LEFT + _WIDTH + 12,
        height=_TOP + _HEIGHT + 40,
    )
    heading = tag("h3", text(f"{title}, {unit}" if unit else title))
    return tag("div", heading, _dashes(drawn), svg)


def bundled(curves: Sequence[Curve]) -> list[Curve]:
    """Leave a run no more curves than can be told apart: the lowest, the median and the highest of many."""
    by_run: dict[int, list[Curve]] = defaultdict(list)
    for one in curves:
        by_run[one.run].append(one)
    return [one for own in by_run.values() for one in (own if len(own) <= len(_DASHES) else _band(own))]


def _band(curves: Sequence[Curve]) -> list[Curve]:
    """Return median, highest and lowest of one run's curves at each place."""
    values: dict[float, list[float]] = defaultdict(list)
    for one in curves:
        for x, y in one.points:
            if math.isfinite(y):
                values[x].append(y)
    taken: dict[str, Callable[[Sequence[float]], float]] = {
        "median": statistics.median,
        "highest": max,
        "lowest": min,
    }
    return [
        Curve(
            name=f"{word} of {len(curves)}",
            label=f"{word} of {len(curves)}",
            run=curves[0].run,
            points=tuple((x, take(found)) for x, found in sorted(values.items())),
            dash=dash,
        )
        for dash, (word, take) in enumerate(taken.items())
    ]


def _dash(curve: Curve) -> str:
    return tuple(_DASHES)[curve.dash % len(_DASHES)]


def _dashes(curves: Sequence[Curve]) -> str:
    """Say what solid and broken lines are, where colours do not tell."""
    words: dict[str, dict[str, None]] = {dash: {} for dash in _DASHES}  # each label once, in order
    for one in curves:
        if one.label:
            words[_dash(one)][one.label] = None
    told = "; ".join(f"{dash}: {', '.join(labels)}" for dash, labels in words.items() if labels)
    return tag("p", text(told), class_="faint") if any(one.dash for one in curves) else ""


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: from nothing where the figures reach near it, else around them."""
    low, high = min(values), max(values)
    if 0 <= low < high / 2:
        low = 0.0
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if low == 0 else low - room), high + room


def _axes(left: float, right: float, low: float, high: float, across: str) -> list[str]:
    bottom, end = _TOP + _HEIGHT, _LEFT + _WIDTH
    drawn = []
    for value in ticks(high, least=low, count=4):
        y = _TOP + (high - value) / (high - low) * _HEIGHT
        drawn.append(line(x1=_LEFT, y1=y, x2=end, y2=y, kind="grid"))
        drawn.append(label(_short(value), x=_LEFT - 6, y=y + 4, anchor="end", kind="label-faint"))
    for value in (tick for tick in ticks(right, least=left, count=4) if tick.is_integer()):
        x = _LEFT + (value - left) / (right - left) * _WIDTH
        drawn.append(label(_short(value), x=x, y=bottom + 17, anchor="middle", kind="label-faint"))
    drawn.append(line(x1=_LEFT, y1=bottom, x2=end, y2=bottom, kind="axis"))
    drawn.append(label(across, x=end, y=bottom + 34, anchor="end", kind="label-faint"))
    return drawn


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    plain = f"{value:.3g}"
    if len(plain) <= _LETTERS:
        return plain
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
