"""A sweep as one HTML page: the ranking, predicted against measured as a picture, and what was not tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from launcher import __version__
from launcher.report.document import document, section
from launcher.report.markup import label, legend, line, picture, table, tag, text
from launcher.report.style import hue
from launcher.sweep.standings import HEADER, WORDS, Standing, Standings, rows, sentences

_LEFT, _TOP, _SIDE = 76.0, 24.0, 420.0
_ROUND = (1.0, 2.0, 5.0)  # times powers of ten


def page(standings: Standings, *, name: str, folder: str) -> str:
    """Return the page."""
    title = f"Sweep: {name}"
    told = (tag("p", text(f"{words}.")) for words in sentences(standings, folder=folder))
    ranking = table(HEADER, rows(standings), caption="Points by measured tokens a second", words=WORDS)
    plans = [(point.shown, point.plan) for point in standings.points]
    planned = table(("point", "plan"), plans, caption="What each point was", words=(0, 1))
    dropped = [(found["shown"], found["reason"]) for found in standings.dropped]
    left_out = table(("point", "reason"), dropped, caption="Points that were not tried", words=(0, 1))
    return document(
        title,
        tag("h1", text(title)),
        *told,
        section("Ranking", ranking),
        section("Predicted and measured", predicted_and_measured(standings.ranked)),
        section("Plans", planned),
        section("Dropped", left_out if dropped else ""),
        tag("footer", text(f"Meshwright {__version__}. Medians of the steps after warm-up.")),
    )


def predicted_and_measured(points: Sequence[Standing]) -> str:
    """Draw each point's predicted step time over its measured one, both logarithmic; nothing without points."""
    pairs = [(point, point.measured_s) for point in points if point.measured_s]
    if not pairs:
        return ""
    engines = sorted({point.strategy for point in points})
    low, high = _range([value for point, measured in pairs for value in (point.predicted_s, measured)])

    def place(seconds: float) -> float:
        return math.log(seconds / low) / math.log(high / low) * _SIDE

    drawn = _axes(low, high, place)
    for rank, (point, measured) in enumerate(pairs, start=1):
        x, y = _LEFT + place(measured), _TOP + _SIDE - place(point.predicted_s)
        told = tag("title", text(f"{rank}: {point.shown}, {point.plan}"))
        drawn.append(
            tag("circle", told, cx=x, cy=y, r=5.5, class_=f"block {hue(engines.index(point.strategy))}")
        )
        drawn.append(label(rank, x=x + 9, y=y + 4))
    chart = picture(
        *drawn,
        name="predicted",
        title="Predicted and measured step times",
        description="A point on the diagonal took as long as predicted; its number is its place in the table.",
        width=_LEFT + _SIDE + 60,
        height=_TOP + _SIDE + 48,
    )
    return legend((hue(index), name) for index, name in enumerate(engines)) + chart


def _axes(low: float, high: float, place: Callable[[float], float]) -> list[str]:
    bottom, right = _TOP + _SIDE, _LEFT + _SIDE
    drawn = []
    for value in _values(low, high):
        x, y = _LEFT + place(value), bottom - place(value)
        drawn.append(line(x1=x, y1=_TOP, x2=x, y2=bottom, kind="grid"))
        drawn.append(line(x1=_LEFT, y1=y, x2=right, y2=y, kind="grid"))
        drawn.append(label(f"{value:g}", x=x, y=bottom + 18, anchor="middle", kind="label-faint"))
        drawn.append(label(f"{value:g}", x=_LEFT - 8, y=y + 4, anchor="end", kind="label-faint"))
    drawn.append(line(x1=_LEFT, y1=bottom, x2=right, y2=_TOP, kind="axis"))
    drawn.append(label("measured, s/step", x=right, y=bottom + 38, anchor="end", kind="label-faint"))
    drawn.append(label("predicted, s/step", x=_LEFT - 68, y=_TOP - 10, kind="label-faint"))
    return drawn


def _range(seconds: Sequence[float]) -> tuple[float, float]:
    return 0.8 * min(seconds), 1.25 * max(seconds)


def _values(low: float, high: float) -> list[float]:
    """Return the round values between two ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [part * 10.0**power for power in decades for part in _ROUND if low <= part * 10.0**power <= high]
