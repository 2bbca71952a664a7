"""Which plans fit, and which is best: rank(), then Ranking.choose(). Pure: no torch, files, clock or environment.

A plan is predicted from first principles (memory.py, step_time.py). The fastest plan wins, but the prediction cannot
tell plans within 5 % of it apart. Of those, the ones that need the least memory remain (up to a tenth of the usable
memory more than the least is no difference), then those that leave a tenth of it free, then the simplest, then the
fastest. Offloading is weighed only where nothing fits without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import strategies as adapters
from launcher.cluster.spec import ClusterSpec
from launcher.errors import PlanError
from launcher.planner.compute import peak_flops
from launcher.planner.cost import GIB, Candidate, CostBreakdown, MemoryCost, parts
from launcher.planner.memory import stage_memory
from launcher.planner.space import PlanRequest, Problem, check_problem, legal_plans
from launcher.planner.stages import stages_of
from launcher.planner.step_time import step_time
from strategies.base import Capabilities
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

__all__ = ["PlanRequest", "Problem", "Ranking", "Rejection", "predict", "rank", "usable_bytes"]

_TIE = 1.05
# Shares of the usable memory: above the first a plan is at the mercy of the estimate; the second is worth having.
_COMFORTABLE = 0.9
_MATERIAL = 0.1
_MOST_DOUBLINGS = 8  # of the nodes, when looking for what would fit


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Plans that are out for one common reason; `nearest` came closest, where the reason is memory."""

    reason: str
    count: int
    nearest: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All that was weighed: what fits, best first, and what does not, by reason."""

    problem: Problem
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]

    def choose(self) -> Candidate:
        """Return the best plan that fits; raise PlanError with the nearest miss and a remedy otherwise."""
        if not self.candidates:
            raise PlanError(_nothing_fits(self))
        return self.candidates[0]


def rank(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    request: PlanRequest,
    *,
    strategies: Sequence[str],
    engine: Mapping[str, Any] | None = None,
) -> Ranking:
    """Weigh every legal plan of the named strategies; raise PlanError when a pinned value allows none."""
    problem = Problem(
        model=model,
        cluster=cluster,
        training=training,
        request=request,
        strategies=tuple(sorted(set(strategies))),
        engine=engine or {},
    )
    check_problem(problem)
    weighed: list[Candidate] = []
    refused: list[Rejection] = []
    for name in problem.strategies:
        try:
            weighed += _weigh(problem, name, adapters.load(name).capabilities)
        except PlanError as error:
            refused.append(Rejection(reason=str(error), count=1))
    if not weighed:
        raise PlanError("; or ".join(dict.fromkeys(rejection.reason for rejection in refused)))
    fitting = [candidate for candidate in weighed if candidate.rejected is None]
    return Ranking(
        problem=problem,
        candidates=tuple(_ordered(fitting, usable_bytes(cluster))),
        rejected=tuple(refused + _grouped([candidate for candidate in weighed if candidate.rejected])),
    )


def predict(problem: Problem, plan: Plan, capabilities: Capabilities) -> CostBreakdown:
    """Return the predicted cost of one legal plan."""
    model, training, cluster = problem.model, problem.training, problem.cluster
    state = capabilities.state_bytes_of(plan)
    stages = stages_of(model, plan)
    costs = [
        stage_memory(
            model,
            plan=plan,
            training=training,
            state=state,
            stage=stage,
            bucket_elements=capabilities.buffer_elements_of(plan),
        )
        for stage in stages
    ]
    (memory, host_bytes), stage = max(zip(costs, stages, strict=True), key=lambda item: item[0][0].total)
    time = step_time(
        model,
        plan=plan,
        training=training,
        cluster=cluster,
        state=state,
        memory=memory,
        host_bytes=host_bytes,
        stages=stages,
    )
    peak = None if cluster.gpu.peak_is_nominal else peak_flops(cluster.gpu, plan.precision)
    return CostBreakdown(
        memory=memory,
        host_bytes=host_bytes,
        stage=stage.index,
        time=time,
        tokens_per_step=training.tokens_per_step,
        num_gpus=plan.world_size,
        model_flops_per_step=model.flops_per_token(training.sequence_length) * training.tokens_per_step,
        peak_flops=peak,
    )


def usable_bytes(cluster: ClusterSpec) -> float:
    """Bytes that a plan may fill on one GPU."""
    return (cluster.gpu.memory_gib - cluster.reserved_gib) * GIB


def _weigh(problem: Problem, strategy: str, capabilities: Capabilities) -> list[Candidate]:
    """Cost the legal plans of one engine; those that offload unasked come last, and only when needed."""
    plans = list(legal_plans(problem, strategy=strategy, capabilities=capabilities))
    request = problem.request
    resident = [
        plan
        for plan in plans
        if plan.offload_optimizer == bool(request.offload_optimizer)
        and plan.offload_parameters == bool(request.offload_parameters)
    ]
    weighed = _cost_all(problem, resident, capabilities)
    if all(candidate.rejected for candidate in weighed):
        seen = set(map(id, resident))
        weighed += _cost_all(problem, [plan for plan in plans if id(plan) not in seen], capabilities)
    return weighed


def _cost_all(problem: Problem, plans: Sequence[Plan], capabilities: Capabilities) -> list[Candidate]:
    """Cost plans that come with growing micro-batches: where one is too large, larger ones are too."""
    weighed, too_large = [], set()
    for plan in plans:
        split = (plan.tp, plan.pp, plan.vp, plan.cp, plan.ep, plan.etp)
        family = (split, plan.zero_stage, plan.recompute, plan.offload_optimizer, plan.offload_parameters)
        if family in too_large:
            reason = "needs more than with a smaller plan.micro_batch_size, which is already too large"
            weighed.append(Candidate(plan=plan, cost=None, rejected=reason))
            continue
        cost = predict(problem, plan, capabilities)
        rejected = _too_large(problem.cluster, cost)
        if rejected:
            too_large.add(family)
        weighed.append(Candidate(plan=plan, cost=cost, rejected=rejected))
    return weighed


def _too_large(cluster: ClusterSpec, cost: CostBreakdown) -> str | None:
    """Return one sentence why the plan does not fit, or None."""
    usable = usable_bytes(cluster)
    if cost.memory.total > usable:
        return (
            f"needs {cost.memory.total / GIB:.1f} GiB per GPU ({_numbers(cost.memory)}) of the "
            f"{usable / GIB:.1f} GiB usable on {cluster.gpu.name}"
        )
    ranks = min(cluster.gpus_per_node, cost.num_gpus)
    if cost.host_bytes * ranks > cluster.host_memory_gib * GIB:
        return (
            f"offloads {cost.host_bytes * ranks / GIB:.1f} GiB per node of the "
            f"cluster.host_memory_gib={cluster.host_memory_gib}"
        )
    return None


def _numbers(memory: MemoryCost) -> str:
    return ", ".join(
        f"{name} {value / GIB:.1f}" for name, value in parts(memory).items() if value >= GIB / 20
    )


def _ordered(fitting: list[Candidate], usable: float) -> list[Candidate]:
    """Sort fastest first, except that a light and simple one of those as fast as the fastest leads."""
    by_time = sorted(fitting, key=lambda candidate: (_step_s(candidate), _simplicity(candidate.plan)))
    if not by_time:
        return []
    limit = _step_s(by_time[0]) * _TIE
    tied = [candidate for candidate in by_time if _step_s(candidate) <= limit]
    lightest = min(_memory(candidate) for candidate in tied)
    chosen = min(
        (candidate for candidate in tied if _memory(candidate) <= lightest + _MATERIAL * usable),
        key=lambda candidate: (
            _memory(candidate) > _COMFORTABLE * usable,
            _simplicity(candidate.plan),
            _step_s(candidate),
        ),
    )
    return [chosen] + [candidate for candidate in by_time if candidate is not chosen]


def _step_s(candidate: Candidate) -> float:
    assert candidate.cost is not None, "a plan is ranked after it was costed"
    return candidate.cost.step_s


def _memory(candidate: Candidate) -> float:
    assert candidate.cost is not None, "a plan is ranked after it was costed"
    return candidate.cost.memory.total


def _simplicity(plan: Plan) -> tuple[Any, ...]:
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
    )


def _grouped(rejected: list[Candidate]) -> list[Rejection]:
    """Sum up one rejection for each engine and ZeRO stage, explained by its nearest miss."""
    groups: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in rejected:
        groups.setdefault((candidate.plan.strategy, candidate.plan.zero_stage), []).append(candidate)
    return [_group(members) for _, members in sorted(groups.items())]


def _group(members: list[Candidate]) -> Rejection:
    nearest = min((member for member in members if member.cost), key=_size)
    plan = nearest.plan
    return Rejection(
        reason=f"strategy={plan.strategy} with plan.zero_stage={plan.zero_stage}: the nearest "
        f"(plan.micro_batch_size={plan.micro_batch_size}, plan.recompute={plan.recompute}) {nearest.rejected}",
        count=len(members),
        nearest=nearest,
    )


def _size(candidate: Candidate) -> tuple[Any, ...]:
    assert candidate.cost is not None, "a plan is too large only after it was costed"
    return (candidate.cost.memory.total, candidate.cost.host_bytes, _simplicity(candidate.plan))


def _nothing_fits(ranking: Ranking) -> str:
    nearest = min((r.nearest for r in ranking.rejected if r.nearest), key=_size)
    problem, plan = ranking.problem, nearest.plan
    pinned = [
        f"plan.{field.name}={getattr(problem.request, field.name)}"
        for field in fields(PlanRequest)
        if getattr(problem.request, field.name) is not None
    ]
    return (
        f"no plan of {problem.model.name}{' with ' + ', '.join(pinned) if pinned else ''} fits "
        f"{problem.cluster.world_size} x {problem.cluster.gpu.name}: the nearest (strategy={plan.strategy}, "
        f"plan.zero_stage={plan.zero_stage}, plan.micro_batch_size={plan.micro_batch_size}, "
        f"plan.recompute={plan.recompute}) {nearest.rejected}; {_remedy(problem)}"
    )


def _remedy(problem: Problem) -> str:
    """Name the smallest change found that makes the run fit: one pin, the engine, all pins, or more nodes."""
    request = problem.request
    pinned = [field.name for field in fields(PlanRequest) if getattr(request, field.name) is not None]
    for key in pinned:
        found = _best_of(replace(problem, request=replace(request, **{key: None})))
        if found:
            return f"plan.{key}={_text(getattr(found.plan, key))} would fit"
    engine = _other_engine(problem)
    if engine:
        return engine
    found = _best_of(replace(problem, request=PlanRequest())) if pinned else None
    if found:
        changed = [key for key in pinned if getattr(found.plan, key) != getattr(request, key)]
        return f"{', '.join(f'plan.{key}={_text(getattr(found.plan, key))}' for key in changed)} would fit"
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
        ranking = rank(
            problem.model,
            problem.cluster,
            problem.training,
            problem.request,
            strategies=problem.strategies,
            engine=problem.engine,
        )
    except PlanError:
        return None
    return ranking.candidates[0] if ranking.candidates else None


def _text(value: Any) -> str:
    """Write a value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
