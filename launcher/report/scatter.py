"""Every plan that fits as a point: memory of the fullest GPU against training speed."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.planner.cost import GIB, Candidate
from launcher.planner.words.explain import cost_of
from launcher.planner.words.tables import describe, gib_text
from launcher.report.markup import box, label, legend, line, picture, tag, text, ticks
from launcher.report.style import hue

MOST_POINTS = 600
_NAMED = 40  # points with a plan under the pointer
_LEFT, _TOP, _WIDTH, _HEIGHT = 76.0, 24.0, 720.0, 340.0


def scatter(candidates: Sequence[Candidate], *, usable_bytes: float) -> str:
    """Draw the candidates, best first; the first of them is the chosen one."""
    shown = candidates[:MOST_POINTS]
    engines = sorted({candidate.plan.strategy for candidate in shown})
    slowest, fastest = _range([cost_of(candidate).tokens_per_s_per_gpu for candidate in shown])
    widest = usable_bytes * 1.06
    drawn = [*_axes(widest / GIB, slowest, fastest), *_limit(usable_bytes, widest)]
    # The best lie on top.
    for position in reversed(range(len(shown))):
        candidate = shown[position]
        cost, index = cost_of(candidate), engines.index(candidate.plan.strategy)
        x = _LEFT + cost.memory.total / widest * _WIDTH
        y = _TOP + _HEIGHT * (fastest - cost.tokens_per_s_per_gpu) / (fastest - slowest)
        title = ""
        if position < _NAMED:
            speed = f"{cost.tokens_per_s_per_gpu:.0f} tokens/s/GPU"
            title = f"{position + 1}: {describe(candidate.plan)}, {gib_text(cost.memory.total)} GiB, {speed}"
        drawn.append(_point(x, y, index, title))
        if position == 0:
            drawn.append(tag("circle", cx=x, cy=y, r=10, class_="ring"))
            left = x > _LEFT + 0.75 * _WIDTH
            drawn.append(
                label("chosen", x=x - 15 if left else x + 15, y=y + 4, anchor="end" if left else "start")
            )
    chart = picture(
        *drawn,
        name="candidates",
        title="Memory and speed of the plans that fit",
        description=f"{_told(candidates)} The chosen one has a ring around it.",
        width=_LEFT + _WIDTH + 110,
        height=_TOP + _HEIGHT + 48,
    )
    return f"{legend((hue(i), name) for i, name in enumerate(engines))}{chart}"


def _told(candidates: Sequence[Candidate]) -> str:
    if len(candidates) > MOST_POINTS:
        return f"The best {MOST_POINTS} of {len(candidates)} plans."
    return f"All {len(candidates)} plans." if len(candidates) > 1 else "The one plan."


def _point(x: float, y: float, index: int, title: str) -> str:
    """Draw a circle, a square, or a diamond, so that engines differ in more than colour."""
    inner = tag("title", text(title)) if title else ""
    kind = f"block {hue(index)}"
    if index % 3 == 0:
        return tag("circle", inner, cx=x, cy=y, r=5.5, class_=kind)
    if index % 3 == 1:
        return box(x=x - 5, y=y - 5, width=10, height=10, kind=kind, title=title)
    return tag("path", inner, d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7-7z", class_=kind)


def _range(speeds: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: from nothing, unless all are about equally fast."""
    slowest, fastest = min(speeds), max(speeds)
    return (0.9 * slowest if slowest > fastest / 2 else 0.0), 1.04 * fastest


def _axes(widest_gib: float, slowest: float, fastest: float) -> list[str]:
    bottom, right = _TOP + _HEIGHT, _LEFT + _WIDTH
    drawn = []
    for value in ticks(widest_gib):
        x = _LEFT + value / widest_gib * _WIDTH
        drawn.append(line(x1=x, y1=_TOP, x2=x, y2=bottom, kind="grid"))
        drawn.append(label(f"{value:g}", x=x, y=bottom + 18, anchor="middle", kind="label-faint"))
    for value in ticks(fastest, least=slowest):
        y = bottom - (value - slowest) / (fastest - slowest) * _HEIGHT
        drawn.append(line(x1=_LEFT, y1=y, x2=right, y2=y, kind="grid"))
        drawn.append(label(f"{value:g}", x=_LEFT - 8, y=y + 4, anchor="end", kind="label-faint"))
    drawn.append(label("GiB on the fullest GPU", x=right, y=bottom + 38, anchor="end", kind="label-faint"))
    drawn.append(label("tokens/s/GPU", x=_LEFT - 68, y=_TOP - 10, kind="label-faint"))
    return drawn


def _limit(usable: float, widest: float) -> list[str]:
    x = _LEFT + usable / widest * _WIDTH
    return [
        line(x1=x, y1=_TOP, x2=x, y2=_TOP + _HEIGHT, kind="limit"),
        label(f"usable {gib_text(usable)}", x=x + 6, y=_TOP + 12, kind="label-limit"),
    ]
