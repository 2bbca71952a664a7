"""The pipeline's schedule of one step as a timeline: one row a stage, one block a pass of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planner.cost import CostBreakdown
from launcher.planner.price.schedule import Block, schedule
from launcher.planner.words.tables import percent_text, seconds_text
from launcher.report.markup import label, legend, line, picture, table, tag, ticks
from strategies.spec import Plan

_MOST_ROWS = 16
_LEAST_MICROBATCHES = 8  # drawn, where there are so many
_LEFT, _TOP, _ROW = 76.0, 30.0, 26.0
_LABELLED = 15.0  # pixels that a number of two digits needs


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What is drawn of a step: a whole schedule of fewer micro-batches, and some of its rows."""

    blocks: tuple[Block, ...]
    stages: tuple[int, ...]
    num_microbatches: int
    forward_s: float  # of one chunk
    backward_s: float

    @property
    def end_s(self) -> float:
        """When the last block ends."""
        return max(block.end_s for block in self.blocks)


def timeline_of(plan: Plan, cost: CostBreakdown) -> Timeline:
    """Place the blocks of one step, as if every stage took as long as the slowest one."""
    forward_s, backward_s = passes_s(plan, cost)
    # Twice as many micro-batches as stages show warm-up, steady state and the end; with chunks, whole rounds of them.
    drawn = min(plan.num_microbatches, max(2 * plan.pp, _LEAST_MICROBATCHES))
    if plan.vp > 1:
        drawn = max(plan.pp, drawn // plan.pp * plan.pp)
    blocks = schedule(
        forward_s=[forward_s] * plan.pp,
        backward_s=[backward_s] * plan.pp,
        num_microbatches=drawn,
        chunks=plan.vp,
    )
    shown = tuple(range(0, plan.pp, -(-plan.pp // _MOST_ROWS)))
    return Timeline(
        blocks=blocks, stages=shown, num_microbatches=drawn, forward_s=forward_s, backward_s=backward_s
    )


def passes_s(plan: Plan, cost: CostBreakdown) -> tuple[float, float]:
    """Split the working time of the slowest stage into forward and backward seconds of one chunk and micro-batch."""
    time = cost.time
    messages = time.tp + time.cp + time.ep
    # A backward pass computes twice what a forward pass does; what is recomputed repeats its messages as well.
    share = 1 / 3 if plan.recompute == "full" else 1 / 2
    forward = time.compute / 3 + messages * share
    backward = time.compute * 2 / 3 + time.recompute + messages * (1 - share)
    count = plan.num_microbatches * plan.vp
    return forward / count, backward / count


def cut(plan: Plan, timeline: Timeline) -> str:
    """Say what of the real schedule is drawn."""
    words = [f"{timeline.num_microbatches} of {plan.num_microbatches} micro-batches"]
    if len(timeline.stages) < plan.pp:
        words.append(f"{len(timeline.stages)} of {plan.pp} stages")
    whole = timeline.num_microbatches == plan.num_microbatches and len(timeline.stages) == plan.pp
    if whole:
        return "Drawn whole."
    return f"Drawn are {' and '.join(words)}; the middle of the real step repeats."


def timeline_chart(plan: Plan, cost: CostBreakdown) -> str:
    """Draw the schedule, and tell in a table what each stage does."""
    timeline = timeline_of(plan, cost)
    end = timeline.end_s
    reach = min(1800.0, max(760.0, end / timeline.forward_s * _LABELLED))
    bottom = _TOP + _ROW * len(timeline.stages)
    drawn = []
    for value in ticks(end):
        x = _LEFT + value / end * reach
        drawn.append(line(x1=x, y1=_TOP - 6, x2=x, y2=bottom, kind="grid"))
        drawn.append(label(f"{value:g} s", x=x, y=_TOP - 12, anchor="middle", kind="label-faint"))
    for row, stage in enumerate(timeline.stages):
        y = _TOP + row * _ROW
        drawn.append(label(f"stage {stage}", x=_LEFT - 8, y=y + 17, anchor="end"))
        drawn += _row([b for b in timeline.blocks if b.stage == stage], y=y, scale=reach / end)
    chart = picture(
        *drawn,
        name="schedule",
        title="Schedule of the pipeline",
        description=f"{cut(plan, timeline)} {_order(plan)}",
        width=_LEFT + reach + 24,
        height=bottom + 8,
    )
    names = legend([("forward", "forward"), ("backward", "backward, with what is recomputed")])
    return f"{names}{chart}{_table(timeline)}"


def _order(plan: Plan) -> str:
    if plan.pp == 1:
        return "There is one stage: micro-batches follow each other, and nothing waits."
    chunks = f" of {plan.vp} chunks a stage, all but the first in another shade" if plan.vp > 1 else ""
    return f"The order is {'interleaved ' if plan.vp > 1 else ''}1F1B{chunks}; numbers are micro-batches."


def _row(blocks: list[Block], *, y: float, scale: float) -> list[str]:
    """Draw the blocks of one stage: one path for each kind, which keeps the page small."""
    drawn, paths = [], dict[str, list[str]]()
    for block in blocks:
        x, width = _LEFT + block.start_s * scale, (block.end_s - block.start_s) * scale
        kind = "backward" if block.work.backward else "forward"
        if width >= _LABELLED - 1:
            number, middle = block.work.micro_batch, x + width / 2
            drawn.append(label(number, x=middle, y=y + 17, anchor="middle", kind=f"label-{kind}"))
        kind += "-later" if block.work.chunk else ""
        paths.setdefault(kind, []).append(f"M{x:.1f} {y + 2:.0f}h{width:.1f}v{_ROW - 4:.0f}h-{width:.1f}z")
    return [tag("path", d="".join(steps), class_=f"block {kind}") for kind, steps in paths.items()] + drawn


def _table(timeline: Timeline) -> str:
    rows = []
    for stage in timeline.stages:
        blocks = [block for block in timeline.blocks if block.stage == stage]
        busy = sum(block.end_s - block.start_s for block in blocks)
        rows.append(
            (
                str(stage),
                seconds_text(blocks[0].start_s),
                seconds_text(blocks[-1].end_s),
                percent_text(1 - busy / timeline.end_s),
                str(_in_flight(blocks)),
            )
        )
    header = ("stage", "starts, s", "ends, s", "idle", "passes kept at once")
    inner = table(header, rows, caption="The schedule as drawn, by stage")
    return tag("details", tag("summary", "As a table"), inner)


def _in_flight(blocks: list[Block]) -> int:
    """Return the largest number of forward passes whose backward pass is still to come."""
    kept = most = 0
    for block in blocks:
        kept += -1 if block.work.backward else 1
        most = max(most, kept)
    return most
