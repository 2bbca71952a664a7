"""Goals other than the fastest plan: fewer GPUs, lower cost, the largest micro-batch, the longest sequence. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from launcher.errors import PlanError
from launcher.planner.price.compute import peak_flops
from launcher.planner.problem import Problem, divisors
from launcher.planner.search.budget import budget
from launcher.planner.search.order import step_s
from launcher.planner.search.ranking import Ranking, solve

# Sequence lengths are sought in steps of this many tokens: all context parallel degrees divide them.
_LENGTH_STEP = 1024


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the plan is to reach. The limits hold for fewest_gpus and cheapest, which try parts of the cluster."""

    name: Literal["fastest", "fewest_gpus", "cheapest", "largest_micro_batch", "longest_sequence"] = "fastest"
    max_step_s: float | None = None  # seconds of one step
    min_tokens_per_s: float | None = None  # of all GPUs together
    max_days: float | None = None  # for all of training.num_steps, failures included where the cluster says

    def __post_init__(self) -> None:
        given = [key for key in _LIMITS if getattr(self, key) is not None]
        for key in given:
            if not getattr(self, key) > 0:
                raise ValueError(f"goal.{key}={getattr(self, key)} must be above 0")
        if given and self.name not in ("fewest_gpus", "cheapest"):
            raise ValueError(
                f"goal.{given[0]}={getattr(self, given[0])} has no effect with goal={self.name}; "
                "use goal=fewest_gpus or goal=cheapest"
            )
        if self.name == "fewest_gpus" and not given:
            raise ValueError(
                "goal=fewest_gpus needs something to reach; set goal.max_step_s, goal.min_tokens_per_s or goal.max_days"
            )

    @property
    def text(self) -> str:
        """Write the limits as they are written on the command line."""
        return ", ".join(
            f"goal.{key}={getattr(self, key)}" for key in _LIMITS if getattr(self, key) is not None
        )


_LIMITS = ("max_step_s", "min_tokens_per_s", "max_days")


def achieve(goal: Goal, problem: Problem) -> Ranking:
    """Return the ranking that serves the goal; its problem is the one that was planned, on fewer GPUs, say."""
    if goal.name == "fewest_gpus":
        return _fewest_gpus(goal, problem)
    if goal.name == "cheapest":
        return _cheapest(goal, problem)
    if goal.name == "largest_micro_batch":
        return _largest_micro_batch(problem)
    if goal.name == "longest_sequence":
        return _longest_sequence(problem)
    return solve(problem)


def _fewest_gpus(goal: Goal, problem: Problem) -> Ranking:
    fastest: Ranking | None = None
    for smaller in _parts_of_the_cluster(problem):
        if not _could_reach(goal, smaller):
            continue
        ranking = _solved(smaller)
        if ranking is None:
            continue
        if _reaches(goal, ranking):
            return ranking
        if fastest is None or _step_s(ranking) < _step_s(fastest):
            fastest = ranking
    raise PlanError(_out_of_reach(goal, problem, fastest))


def _cheapest(goal: Goal, problem: Problem) -> Ranking:
    """Return the plan of the fewest GPU hours, failures included: money is these times one price."""
    best: tuple[float, Ranking] | None = None
    fastest: Ranking | None = None
    for smaller in _parts_of_the_cluster(problem):
        ranking = _solved(smaller) if _could_reach(goal, smaller) else None
        if ranking is None:
            continue
        hours = budget(ranking).expected_s * smaller.cluster.world_size
        if _reaches(goal, ranking) and (best is None or hours < best[0]):
            best = (hours, ranking)
        if fastest is None or _step_s(ranking) < _step_s(fastest):
            fastest = ranking
    if best is None:
        raise PlanError(_out_of_reach(goal, problem, fastest))
    return best[1]


def _largest_micro_batch(problem: Problem) -> Ranking:
    """Pin ever smaller micro-batches until one fits."""
    if problem.request.micro_batch_size is None and problem.request.num_microbatches is None:
        for size in reversed(divisors(problem.training.global_batch_size)):
            ranking = _solved(replace(problem, request=replace(problem.request, micro_batch_size=size)))
            if ranking is not None:
                return replace(ranking, problem=problem)
    return solve(problem)


def _longest_sequence(problem: Problem) -> Ranking:
    """Find the longest sequence that fits by bisection."""
    longest = problem.model.max_position_embeddings
    lengths = sorted({*range(_LENGTH_STEP, longest, _LENGTH_STEP), longest})
    found: Ranking | None = None
    low, high = 0, len(lengths)
    middle = high - 1  # perhaps all of them fit
    while low < high:
        training = replace(problem.training, sequence_length=lengths[middle])
        ranking = _solved(replace(problem, training=training))
        if ranking is None:
            high = middle
        else:
            low, found = middle + 1, ranking
        middle = (low + high) // 2
    return found or solve(replace(problem, training=replace(problem.training, sequence_length=lengths[0])))


def _parts_of_the_cluster(problem: Problem) -> Iterator[Problem]:
    """Yield the problem on fewer GPUs, fewest first: parts of one node, then 2^k and 3 * 2^k nodes, then all."""
    cluster = problem.cluster
    for gpus in _steps(cluster.gpus_per_node):
        if gpus < cluster.gpus_per_node:
            yield replace(problem, cluster=replace(cluster, num_nodes=1, gpus_per_node=gpus))
    for nodes in _steps(cluster.num_nodes):
        yield replace(problem, cluster=replace(cluster, num_nodes=nodes))


def _steps(most: int) -> list[int]:
    powers = [1 << k for k in range(most.bit_length())]
    return sorted({most, *(n for n in powers if n <= most), *(3 * n for n in powers if 3 * n <= most)})


def _could_reach(goal: Goal, problem: Problem) -> bool:
    """Say whether the limits could be kept if every GPU ran at its peak."""
    training, cluster = problem.training, problem.cluster
    peak = peak_flops(cluster.gpu, training.precision) * cluster.world_size
    if cluster.gpu.peak_is_nominal or not peak:
        return True
    flops = problem.model.flops_per_token(training.sequence_length) * training.tokens_per_step
    return flops / peak <= _most_step_s(goal, problem)


def _most_step_s(goal: Goal, problem: Problem) -> float:
    """Return the seconds that a step may take under all limits, failures left aside."""
    training = problem.training
    limits = [goal.max_step_s or float("inf")]
    if goal.min_tokens_per_s is not None:
        limits.append(training.tokens_per_step / goal.min_tokens_per_s)
    if goal.max_days is not None:
        limits.append(goal.max_days * 86400 / training.num_steps)
    return min(limits)


def _reaches(goal: Goal, ranking: Ranking) -> bool:
    if _step_s(ranking) > _most_step_s(goal, ranking.problem):
        return False
    return goal.max_days is None or budget(ranking).expected_s <= goal.max_days * 86400


def _step_s(ranking: Ranking) -> float:
    return step_s(ranking.choose())


def _solved(problem: Problem) -> Ranking | None:
    """Return the ranking of a problem that has a plan, else None."""
    try:
        ranking = solve(problem)
    except PlanError:
        return None
    return ranking if ranking.candidates else None


def _out_of_reach(goal: Goal, problem: Problem, fastest: Ranking | None) -> str:
    gpus = problem.cluster.world_size
    if fastest is None:
        whole = solve(problem)
        best = step_s(whole.choose())  # raises where nothing fits
        return (
            f"{goal.text} is out of reach of {gpus} x {problem.cluster.gpu.name} even at its peak: the best plan "
            f"takes {best:.3g} s a step; use more GPUs or another limit"
        )
    return (
        f"no plan of {problem.model.name} on up to {gpus} x {problem.cluster.gpu.name} reaches {goal.text}: "
        f"the fastest takes {_step_s(fastest):.3g} s a step on {fastest.problem.cluster.world_size} GPUs; "
        "use more GPUs or another limit"
    )
