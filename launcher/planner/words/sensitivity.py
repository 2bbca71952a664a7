"""Which link and which memory size would change the answer: `--sensitivity` ranks again on changed hardware. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.cluster.spec import ClusterSpec
from launcher.decode import encode
from launcher.errors import PlanError
from launcher.planner.cost import Candidate
from launcher.planner.problem import text_of
from launcher.planner.search.ranking import Ranking, solve
from launcher.planner.words.explain import cost_of
from launcher.planner.words.tables import differences, grid, key_of, seconds_text

_BANDWIDTH = (0.5, 2.0)
_MEMORY = (0.5, 1.5, 2.0)
_LATENCY = 4.0

HEADER = ("what changes", "from", "to", "s/step", "", "the plan then")


@dataclass(frozen=True, kw_only=True)
class Shift:
    """The answer on hardware that differs in one figure; `candidate` None: nothing fits there."""

    key: str  # of the cluster
    before: float
    after: float
    candidate: Candidate | None

    @property
    def factor(self) -> float:
        """How many times the figure that the cluster has."""
        return self.after / self.before


def sensitivity(ranking: Ranking) -> tuple[Shift, ...]:
    """Rank again for each link at half and double speed, more latency, and other memory sizes."""
    return tuple(
        Shift(key=key, before=before, after=after, candidate=_best(ranking, cluster))
        for key, before, after, cluster in _variations(ranking.problem.cluster)
    )


def changes(ranking: Ranking, shift: Shift) -> dict[str, tuple[object, object]]:
    """Return what the best plan there says differently, by field; empty: the same plan, or none."""
    return differences(ranking.choose().plan, shift.candidate.plan) if shift.candidate else {}


def verdict(ranking: Ranking, shifts: Sequence[Shift]) -> str:
    """Say in one sentence which figures the choice depends on."""
    keys = dict.fromkeys(shift.key for shift in shifts)
    moved = dict.fromkeys(shift.key for shift in shifts if shift.candidate is None or changes(ranking, shift))
    if not moved:
        return f"the chosen plan stays the best one whichever of these changes: {', '.join(keys)}"
    held = [key for key in keys if key not in moved]
    stays = f"; it holds whatever happens to {', '.join(held)}" if held else ""
    return f"the choice depends on {', '.join(moved)}{stays}"


def to_json(ranking: Ranking, shifts: Sequence[Shift]) -> dict[str, Any]:
    """Return the shifts as plain data."""
    return {"verdict": verdict(ranking, shifts), "shifts": [_shift(ranking, shift) for shift in shifts]}


def to_text(ranking: Ranking, shifts: Sequence[Shift]) -> str:
    """Write one line for each change of the hardware."""
    rows: list[tuple[str, ...]] = [HEADER]
    rows += [cells(ranking, shift) for shift in shifts]
    return f"sensitivity: {verdict(ranking, shifts)}\n{grid(rows, words=(0, 5))}"


def cells(ranking: Ranking, shift: Shift) -> tuple[str, ...]:
    """Return one row: key, before, after, step time, its change, and what the plan would be."""
    figures = (shift.key, f"{shift.before:g}", f"{shift.after:g}")
    if shift.candidate is None:
        return (*figures, "-", "-", "none fits")
    step_s, now_s = cost_of(shift.candidate).step_s, cost_of(ranking.choose()).step_s
    words = [f"{key_of(name)}={text_of(after)}" for name, (_, after) in changes(ranking, shift).items()]
    return (
        *figures,
        seconds_text(step_s),
        f"{100 * (step_s / now_s - 1):+.1f}%",
        " ".join(words) or "the same",
    )


def _shift(ranking: Ranking, shift: Shift) -> dict[str, Any]:
    changed = changes(ranking, shift)
    return {
        "key": shift.key,
        "before": shift.before,
        "after": shift.after,
        "factor": shift.factor,
        "fits": shift.candidate is not None,
        "same_plan": shift.candidate is not None and not changed,
        "changes": {
            key_of(name): {"chosen": encode(one), "then": encode(two)} for name, (one, two) in changed.items()
        },
        "plan": encode(shift.candidate.plan) if shift.candidate else None,
        "step_s": cost_of(shift.candidate).step_s if shift.candidate else None,
    }


def _best(ranking: Ranking, cluster: ClusterSpec) -> Candidate | None:
    try:
        found = solve(replace(ranking.problem, cluster=cluster))
    except PlanError:
        return None
    return found.candidates[0] if found.candidates else None


def _variations(cluster: ClusterSpec) -> Iterator[tuple[str, float, float, ClusterSpec]]:
    """Yield key, value, changed value and the changed cluster."""
    used = cluster.links.index(cluster.link_for(cluster.world_size)) + 1 if cluster.world_size > 1 else 0
    for index, link in enumerate(cluster.links[:used]):
        for key, factors in (("gb_per_s", _BANDWIDTH), ("latency_us", (_LATENCY,))):
            before = getattr(link, key)
            for factor in factors:
                links = list(cluster.links)
                links[index] = replace(link, **{key: before * factor})
                name = f"cluster.links[{index}].{key}"
                yield name, before, before * factor, replace(cluster, links=tuple(links))
    before = cluster.gpu.memory_gib
    for factor in _MEMORY:
        if before * factor > cluster.reserved_gib:
            gpu = replace(cluster.gpu, memory_gib=before * factor)
            yield "cluster.gpu.memory_gib", before, before * factor, replace(cluster, gpu=gpu)
