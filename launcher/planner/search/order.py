"""Which of the plans that fit is best, and in which order the others follow.

The fastest plan wins, but the prediction cannot tell plans within 5 % of it apart. Of those, the ones that need the
least memory remain (up to a tenth of the usable memory more than the least is no difference), then those that leave a
tenth of it free, then the simplest, then the fastest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from launcher.planner.cost import Candidate
from strategies.spec import Plan

TIE = 1.05
# Shares of the usable memory: above the first a plan is at the mercy of the estimate; the second is worth having.
COMFORTABLE = 0.9
MATERIAL = 0.1


def ordered(fitting: Iterable[Candidate], *, usable: float) -> list[Candidate]:
    """Sort fastest first, except that a light and simple one of those as fast as the fastest leads."""
    by_time = sorted(fitting, key=lambda candidate: (step_s(candidate), simplicity(candidate.plan)))
    if not by_time:
        return []
    limit = step_s(by_time[0]) * TIE
    tied = [candidate for candidate in by_time if step_s(candidate) <= limit]
    lightest = min(memory_bytes(candidate) for candidate in tied)
    chosen = min(
        (candidate for candidate in tied if memory_bytes(candidate) <= lightest + MATERIAL * usable),
        key=lambda candidate: (
            memory_bytes(candidate) > COMFORTABLE * usable,
            simplicity(candidate.plan),
            step_s(candidate),
        ),
    )
    return [chosen] + [candidate for candidate in by_time if candidate is not chosen]


def step_s(candidate: Candidate) -> float:
    """Seconds of one step of a candidate that fits."""
    assert candidate.cost is not None, "a plan is ranked after it was costed"
    return candidate.cost.step_s


def memory_bytes(candidate: Candidate) -> float:
    """Bytes of the fullest rank of a candidate that fits."""
    assert candidate.cost is not None, "a plan is ranked after it was costed"
    return candidate.cost.memory.total


def simplicity(plan: Plan) -> tuple[Any, ...]:
    """Return the order of preference between equally fast plans, least first."""
    return (
        plan.offload_parameters,
        plan.offload_optimizer,
        plan.pp,
        plan.tp * plan.cp,
        plan.zero_stage,
        ("none", "selective", "full").index(plan.recompute),
        plan.vp,
        plan.ep * plan.etp,
        plan.num_microbatches,
        plan.tp,
        plan.strategy,
        plan.sequence_parallel,
        plan.recompute_num_layers,
        plan.recompute_modules,
        plan.pipeline_split,
        plan.rank_order,
        plan.ep,
    )
