"""Which plans fit, and which is best: rank(), then Ranking.choose(). Pure: no torch, files, clock or environment.

A plan is predicted from first principles (estimate.py); which one is best says order.py, how few have to be costed to
know it sweep.py. Offloading is weighed only where nothing fits without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import strategies as adapters
from launcher.cluster.spec import ClusterSpec
from launcher.errors import PlanError
from launcher.planner.calibration import Calibration
from launcher.planner.cost import Candidate, CostBreakdown
from launcher.planner.price.calibrated import estimator_of
from launcher.planner.price.estimate import usable_bytes
from launcher.planner.problem import PlanRequest, Problem, check_problem, text_of
from launcher.planner.search.order import COMFORTABLE, MATERIAL, TIE, ordered, simplicity
from launcher.planner.search.sweep import sweep
from launcher.planner.space.plans import Space
from strategies.base import Capabilities
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

__all__ = [
    "COMFORTABLE",
    "MATERIAL",
    "TIE",
    "PlanRequest",
    "Problem",
    "Ranking",
    "Rejection",
    "predict",
    "rank",
    "solve",
    "usable_bytes",
]

_MOST_DOUBLINGS = 8  # of the nodes, when looking for what would fit


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Plans that are out for one common reason; `nearest` came closest, where the reason is memory."""

    reason: str
    count: int
    nearest: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All that was weighed: what fits, best first, and what does not, by reason.

    Of a large space the candidates are those that may be chosen or shown: the first ones are exact, and plans that no
    estimate could bring among them are counted in `num_slow` only.
    """

    problem: Problem
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    num_considered: int = 0  # legal plans
    num_costed: int = 0  # of these, plans whose time was computed in full
    num_slow: int = 0  # of these, plans whose micro-batches alone take longer than `limit_s`
    limit_s: float | None = None  # None: nothing was left out

    def choose(self) -> Candidate:
        """Return the best plan that fits; raise PlanError with the nearest miss and a remedy otherwise."""
        if not self.candidates:
            raise PlanError(_nothing_fits(self))
        return self.candidates[0]

    def nearest_miss(self) -> Candidate:
        """Return the smallest of the plans that are too large; some plan must be."""
        return min((found.nearest for found in self.rejected if found.nearest), key=_size)


def rank(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    request: PlanRequest,
    *,
    strategies: Sequence[str],
    engine: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Ranking:
    """Weigh every legal plan of the named strategies; raise PlanError when a pinned value allows none."""
    problem = Problem(
        model=model,
        cluster=cluster,
        training=training,
        request=request,
        strategies=tuple(sorted(set(strategies))),
        engine=engine or {},
        calibration=calibration,
    )
    return solve(problem)


def solve(problem: Problem, *, only_best: bool = False) -> Ranking:
    """Weigh every legal plan of a problem; raise PlanError when a pinned value allows none.

    With `only_best` the ranking holds the choice and its ties, and says of what does not fit only where nothing does.
    """
    check_problem(problem)
    spaces: list[Space] = []
    refused: list[tuple[str, str]] = []
    for name in problem.strategies:
        try:
            spaces.append(Space(problem, strategy=name, capabilities=adapters.capabilities(name)))
        except PlanError as error:
            refused.append((name, str(error)))
    if not spaces:
        raise PlanError("; or ".join(dict.fromkeys(reason for _, reason in refused)))
    found = sweep(problem, spaces, only_best=only_best)
    rejected = [_rejection(count, nearest) for _, (count, nearest) in sorted(found.misses.items())]
    return Ranking(
        problem=problem,
        candidates=tuple(ordered(found.fitting, usable=usable_bytes(problem.cluster))),
        rejected=(*_refusals(refused), *rejected),
        num_considered=found.num_considered,
        num_costed=found.num_costed,
        num_slow=found.num_slow,
        limit_s=found.limit_s if found.num_slow else None,
    )


def predict(problem: Problem, plan: Plan, capabilities: Capabilities) -> CostBreakdown:
    """Return the predicted cost of one legal plan."""
    return estimator_of(problem, capabilities).predict(plan)


def _refusals(refused: Sequence[tuple[str, str]]) -> list[Rejection]:
    """Sum up the engines that have no legal plan; each sentence names its engine."""
    return [
        Rejection(reason=reason if f"strategy={name}" in reason else f"strategy={name}: {reason}", count=1)
        for name, reason in refused
    ]


def _rejection(count: int, nearest: Candidate) -> Rejection:
    """Sum up the plans of one engine and ZeRO stage that do not fit, explained by the nearest miss."""
    plan = nearest.plan
    return Rejection(
        reason=f"strategy={plan.strategy} with plan.zero_stage={plan.zero_stage}: the nearest "
        f"(plan.micro_batch_size={plan.micro_batch_size}, plan.recompute={plan.recompute}) {nearest.rejected}",
        count=count,
        nearest=nearest,
    )


def _nothing_fits(ranking: Ranking) -> str:
    nearest = ranking.nearest_miss()
    problem, plan = ranking.problem, nearest.plan
    pinned = [f"plan.{key}={text_of(value)}" for key, value in problem.request.pins().items()]
    return (
        f"no plan of {problem.model.name}{' with ' + ', '.join(pinned) if pinned else ''} fits "
        f"{problem.cluster.world_size} x {problem.cluster.gpu.name}: the nearest (strategy={plan.strategy}, "
        f"plan.zero_stage={plan.zero_stage}, plan.micro_batch_size={plan.micro_batch_size}, "
        f"plan.recompute={plan.recompute}) {nearest.rejected}; {_remedy(problem)}"
    )


def _remedy(problem: Problem) -> str:
    """Name the smallest change found that makes the run fit: one pin, the engine, all pins, or more nodes."""
    request = problem.request
    pinned = list(request.pins())
    for key in pinned:
        found = _best_of(replace(problem, request=replace(request, **{key: None})))
        if found:
            return f"plan.{key}={text_of(getattr(found.plan, key))} would fit"
    engine = _other_engine(problem)
    if engine:
        return engine
    found = _best_of(replace(problem, request=PlanRequest())) if pinned else None
    if found:
        changed = [key for key in pinned if getattr(found.plan, key) != getattr(request, key)]
        return f"{', '.join(f'plan.{key}={text_of(getattr(found.plan, key))}' for key in changed)} would fit"
    return _more_nodes(problem) or (
        "use a smaller model, a shorter training.sequence_length or GPUs with more memory"
    )


def _other_engine(problem: Problem) -> str | None:
    """Name an engine that was not asked, installed or not, and what it would take to the host."""
    for name in adapters.ENGINE_PACKAGES:
        if name in problem.strategies:
            continue
        # The keys passed through are those of the engine asked.
        found = _best_of(replace(problem, strategies=(name,), engine={}))
        if found:
            switches = [
                key for key in ("offload_optimizer", "offload_parameters") if getattr(found.plan, key)
            ]
            words = " ".join(f"plan.{key}=true" for key in switches)
            return f"strategy={name} would fit{f', with {words}' if words else ''}"
    return None


def _more_nodes(problem: Problem) -> str | None:
    """Say from how many nodes on the run fits, the global batch grown to a multiple of the ranks if need be."""
    if problem.cluster.gpu.device == "cpu":
        return None
    request = replace(problem.request, dp=None, num_microbatches=None)
    batch = problem.training.global_batch_size
    for doublings in range(1, _MOST_DOUBLINGS + 1):
        cluster = replace(problem.cluster, num_nodes=problem.cluster.num_nodes << doublings)
        grown = -(-batch // cluster.world_size) * cluster.world_size
        training = replace(problem.training, global_batch_size=grown)
        if _best_of(replace(problem, cluster=cluster, training=training, request=request)):
            words = f" with training.global_batch_size={grown}" if grown != batch else ""
            return f"cluster.num_nodes={cluster.num_nodes}{words} would fit"
    return None


def _best_of(problem: Problem) -> Candidate | None:
    try:
        candidates = solve(problem, only_best=True).candidates
    except PlanError:
        return None
    return candidates[0] if candidates else None


def _size(candidate: Candidate) -> tuple[Any, ...]:
    assert candidate.cost is not None, "a plan is too large only after it was costed"
    return (candidate.cost.memory.total, candidate.cost.host_bytes, simplicity(candidate.plan))
