"""Stacked bars: memory of every pipeline stage against the limit, seconds of a step by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.planner.cost import GIB, MemoryCost, parts
from launcher.planner.words.tables import gib_text, seconds_text
from launcher.report.markup import box, label, legend, line, picture, table, ticks
from launcher.report.style import hue

_LEFT, _TOP, _HEIGHT = 56.0, 28.0, 260.0
_ROW = 34.0


def memory_bars(stages: Sequence[tuple[int, MemoryCost]], *, usable_bytes: float, gpu_bytes: float) -> str:
    """Draw one bar a stage, up to the memory of the GPU; `stages` are index and bytes."""
    names = _used([parts(cost) for _, cost in stages])
    most = max(gpu_bytes, *(cost.total for _, cost in stages))
    step = max(26.0, min(90.0, 760.0 / len(stages)))
    width = _LEFT + step * len(stages) + 150
    drawn = _axis(most, width - 150)
    for column, (index, cost) in enumerate(stages):
        x, below = _LEFT + (column + 0.12) * step, _TOP + _HEIGHT
        for name in names:
            height = parts(cost)[name] / most * _HEIGHT
            below -= height
            told = f"stage {index}, {name}: {gib_text(parts(cost)[name])} GiB"
            kind = f"block {hue(names.index(name))}"
            drawn.append(box(x=x, y=below, width=0.76 * step, height=height, kind=kind, title=told))
        middle = x + 0.38 * step
        if step >= 40:
            drawn.append(label(gib_text(cost.total), x=middle, y=below - 5, anchor="middle"))
        drawn.append(label(index, x=middle, y=_TOP + _HEIGHT + 17, anchor="middle", kind="label-faint"))
    drawn += _limits(usable_bytes, gpu_bytes, most, width - 150)
    drawn.append(label("pipeline stage", x=_LEFT, y=_TOP + _HEIGHT + 36, kind="label-faint"))
    fullest = max(stages, key=lambda item: item[1].total)
    told = f"Stage {fullest[0]} is the fullest: {gib_text(fullest[1].total)} of {gib_text(usable_bytes)} usable GiB."
    chart = picture(
        *drawn,
        name="memory",
        title="Memory of one GPU by pipeline stage",
        description=told,
        width=width,
        height=_TOP + _HEIGHT + 44,
    )
    return f"{legend((hue(i), name) for i, name in enumerate(names))}{chart}"


def memory_table(stages: Sequence[tuple[int, MemoryCost]]) -> str:
    """Write the same figures."""
    names = _used([parts(cost) for _, cost in stages])
    rows = [
        (str(index), *(gib_text(parts(cost)[name]) for name in names), gib_text(cost.total))
        for index, cost in stages
    ]
    return table(("stage", *names, "total"), rows, caption="GiB on one GPU of each pipeline stage")


def time_bars(steps: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Draw one lying bar a plan, the chosen one first; `steps` are name and seconds by part."""
    names = _used([seconds for _, seconds in steps])
    most = max(sum(seconds.values()) for _, seconds in steps)
    left, reach = 84.0, 700.0
    bottom = _TOP + _ROW * len(steps)
    drawn = []
    for value in ticks(most):
        x = left + value / most * reach
        drawn.append(line(x1=x, y1=_TOP - 6, x2=x, y2=bottom, kind="grid"))
        drawn.append(label(f"{value:g} s", x=x, y=_TOP - 12, anchor="middle", kind="label-faint"))
    for row, (name, seconds) in enumerate(steps):
        x, y = left, _TOP + row * _ROW
        drawn.append(label(name, x=left - 8, y=y + 20, anchor="end"))
        for part in names:
            length = seconds[part] / most * reach
            told = f"{name}, {part}: {seconds_text(seconds[part])} s"
            kind = f"block {hue(names.index(part))}"
            drawn.append(box(x=x, y=y + 4, width=length, height=_ROW - 10, kind=kind, title=told))
            x += length
        drawn.append(label(f"{seconds_text(sum(seconds.values()))} s", x=x + 6, y=y + 20))
    first, seconds = steps[0]
    longest = max(seconds, key=lambda part: seconds[part])
    share = seconds[longest] / sum(seconds.values())
    chart = picture(
        *drawn,
        name="time",
        title="Seconds of one step by part",
        description=f"Of the {first} plan, {longest} takes most: {100 * share:.0f} % of the step.",
        width=left + reach + 90,
        height=bottom + 6,
    )
    return f"{legend((hue(i), name) for i, name in enumerate(names))}{chart}"


def time_table(steps: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Write the same figures, one column a plan."""
    names = _used([seconds for _, seconds in steps])
    rows = [(name, *(seconds_text(seconds[name]) for _, seconds in steps)) for name in names]
    rows.append(("total", *(seconds_text(sum(seconds.values())) for _, seconds in steps)))
    return table(("part", *(name for name, _ in steps)), rows, caption="Seconds of one step")


def _used(costs: Sequence[Mapping[str, float]]) -> list[str]:
    return [name for name in costs[0] if any(cost[name] for cost in costs)]


def _axis(most: float, right: float) -> list[str]:
    drawn = []
    for value in ticks(most / GIB):
        y = _TOP + _HEIGHT * (1 - value * GIB / most)
        drawn.append(line(x1=_LEFT, y1=y, x2=right, y2=y, kind="grid"))
        drawn.append(label(f"{value:g}", x=_LEFT - 8, y=y + 4, anchor="end", kind="label-faint"))
    drawn.append(label("GiB", x=_LEFT - 8, y=_TOP - 12, anchor="end", kind="label-faint"))
    return drawn


def _limits(usable: float, whole: float, most: float, right: float) -> list[str]:
    y = _TOP + _HEIGHT * (1 - usable / most)
    words = label(f"usable {gib_text(usable)}", x=right + 8, y=y + 4, kind="label-limit")
    above = _TOP + _HEIGHT * (1 - whole / most)
    top = label(f"GPU {gib_text(whole)}", x=right + 8, y=min(above + 4, y - 12), kind="label-faint")
    drawn = [line(x1=_LEFT, y1=y, x2=right + 4, y2=y, kind="limit"), words, top]
    return [*drawn, line(x1=_LEFT, y1=above, x2=right + 4, y2=above, kind="axis")]
