"""Losses of several engines on top of each other, and below how far each is from the first one, as one SVG file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from launcher.report.comparison import Comparison, Curve
from launcher.report.markup import drawing, label, line, tag, ticks
from launcher.report.style import hue, picture_css

_LEFT, _TOP, _WIDTH = 76.0, 64.0, 720.0
_LOSSES, _GAP, _DEVIATIONS = 280.0, 58.0, 190.0  # heights of the two panels and of what is between them
# Of the deviations drawn: fp32 tells no less apart, and more is another loss altogether.
_LOWEST, _HIGHEST = 1e-8, 1.0

Place = Callable[[float], float]


def curves(comparison: Comparison, *, title: str) -> str:
    """Draw the comparison. Equal curves hide each other, so that each is narrower than those below it."""
    steps = comparison.steps
    last = steps[-1]

    def x(step: float) -> float:
        return _LEFT + (step - steps[0]) / max(1, last - steps[0]) * _WIDTH

    bottom = _TOP + _LOSSES + _GAP + _DEVIATIONS
    drawn = [
        label(title, x=_LEFT, y=22.0),
        *_legend(comparison.curves),
        *_losses(comparison, x),
        *_deviations(comparison, x),
        *(
            label(f"{step:g}", x=x(step), y=bottom + 18, anchor="middle", kind="label-faint")
            for step in ticks(last, least=steps[0])
        ),
        label("step", x=_LEFT + _WIDTH, y=bottom + 36, anchor="end", kind="label-faint"),
    ]
    return drawing(
        *drawn,
        name="losses",
        title=title,
        description=f"{comparison.verdict}.",
        width=_LEFT + _WIDTH + 24,
        height=bottom + 46,
        css=picture_css(),
    )


def _losses(comparison: Comparison, x: Place) -> list[str]:
    values = [v for curve in comparison.curves for v in curve.losses.values() if math.isfinite(v)] or [0.0]
    low, high = min(values), max(values)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)

    def y(loss: float) -> float:
        return _TOP + _LOSSES * (high - loss) / (high - low)

    drawn = [label("loss, nats", x=_LEFT - 8, y=_TOP - 10, anchor="end", kind="label-faint")]
    drawn += _lines([(value, f"{value:g}") for value in ticks(high, least=low)], y)
    for index, curve in enumerate(comparison.curves):
        points = [(x(step), y(curve.losses[step])) for step in comparison.steps]
        drawn.append(_path(points, index, width=_width(index, len(comparison.curves))))
    return drawn


def _deviations(comparison: Comparison, x: Place) -> list[str]:
    top, first = _TOP + _LOSSES + _GAP, comparison.curves[0].strategy
    worst = max(comparison.largest(curve)[1] for curve in comparison.curves[1:])
    limits = [worst, comparison.max_deviation or 0.0, 1e-5]
    high = min(_HIGHEST, 10.0 ** math.floor(math.log10(max(v for v in limits if math.isfinite(v))) + 1))

    def y(deviation: float) -> float:
        share = math.log(max(_LOWEST, min(high, deviation)) / _LOWEST) / math.log(high / _LOWEST)
        return top + _DEVIATIONS * (1 - share)

    words = f"deviation from the loss of {first}, relative; equal losses lie at the bottom"
    drawn = [label(words, x=_LEFT, y=top - 12, kind="label-faint")]
    decades = range(round(math.log10(_LOWEST)), round(math.log10(high)) + 1)
    drawn += _lines([(10.0**power, f"1e{power}") for power in decades], y)
    for index, curve in enumerate(comparison.curves[1:], start=1):
        found = comparison.deviations(curve)
        points = [(x(step), y(found[step])) for step in comparison.steps if not math.isnan(found[step])]
        drawn.append(_path(points, index, width=2.0))
    return drawn + _limit(comparison.max_deviation, y)


def _limit(limit: float | None, y: Place) -> list[str]:
    if limit is None:
        return []
    words = label(
        f"checks.max_deviation={limit:g}", x=_LEFT + _WIDTH, y=y(limit) - 6, anchor="end", kind="label-limit"
    )
    return [line(x1=_LEFT, y1=y(limit), x2=_LEFT + _WIDTH, y2=y(limit), kind="limit"), words]


def _lines(values: Sequence[tuple[float, str]], y: Place) -> list[str]:
    drawn = []
    for value, words in values:
        drawn.append(line(x1=_LEFT, y1=y(value), x2=_LEFT + _WIDTH, y2=y(value), kind="grid"))
        drawn.append(label(words, x=_LEFT - 8, y=y(value) + 4, anchor="end", kind="label-faint"))
    return drawn


def _legend(found: Sequence[Curve]) -> list[str]:
    drawn, x = [], _LEFT
    for index, curve in enumerate(found):
        drawn.append(_path([(x, 42.0), (x + 26, 42.0)], index, width=_width(index, len(found))))
        drawn.append(label(curve.strategy, x=x + 34, y=46.0))
        x += 34 + 7.5 * len(curve.strategy) + 34
    return drawn


def _width(index: int, count: int) -> float:
    return 1.8 + 2.6 * (count - 1 - index)


def _path(points: Sequence[tuple[float, float]], index: int, *, width: float) -> str:
    """Draw a curve; points that are no numbers interrupt nothing, they are left out."""
    steps = [f"{x:.1f} {y:.1f}" for x, y in points if math.isfinite(x) and math.isfinite(y)]
    d = f"M{'L'.join(steps)}" if steps else "M0 0"
    return tag("path", d=d, class_=f"curve {hue(index)}", stroke_width=width, stroke_linejoin="round")
