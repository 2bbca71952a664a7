"""Curves over steps: one chart a metric, all runs on top of each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.report.markup import label, line, picture, tag, text, ticks
from launcher.report.style import hue

_MOST_POINTS = 400  # of one curve; more are averaged
_LEFT, _TOP, _WIDTH, _HEIGHT = 54.0, 12.0, 372.0, 190.0
_DASHES = ("", "7 4", "2 3", "9 3 2 3")  # so that runs differ in more than colour


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its name, the place of its run among the runs, and (x, y) points in order of x."""

    name: str
    run: int
    points: tuple[tuple[float, float], ...]
    dash: int = 0

    def thinned(self) -> Curve:
        """Return the curve with few enough points to draw, and none that is no number."""
        finite = [(x, y) for x, y in self.points if math.isfinite(y)]
        size = -(-len(finite) // _MOST_POINTS) or 1
        groups = [finite[i : i + size] for i in range(0, len(finite), size)]
        means = tuple((statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups)
        return Curve(name=self.name, run=self.run, points=means, dash=self.dash)


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
    drawn = [c for c in (one.thinned() for one in curves) if c.points]
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
                stroke_dasharray=_DASHES[one.dash % len(_DASHES)] or "none",
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
    return tag("div", heading, svg)


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
    return f"{value:.3g}"
