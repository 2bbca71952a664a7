"""From words with several values to points that can be: impossible ones dropped with a reason, equal ones once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher import compose, freeze
from launcher.compose import Composed
from launcher.config import ChecksConfig, Job, StrategyConfig, SweepConfig
from launcher.errors import ClusterError, ConfigError, LauncherError
from launcher.freeze import Decision
from launcher.planner.problem import PlanRequest, pinned, text_of
from launcher.planner.words.tables import describe
from launcher.submit import local
from strategies.spec import Plan

_MULTIRUN = ("--multirun", "-m")
_OWN = ("run_dir=", "sweep.", "hydra.")  # words of the whole sweep, which no point of it is launched with
_LONGEST_LABEL = 48


@dataclass(frozen=True, kw_only=True)
class Point:
    """A combination that can be trained."""

    words: tuple[str, ...]  # its overrides that not all others share
    shown: str  # the same for a person, with the plan where that is all that tells it from others
    decision: Decision

    @property
    def label(self) -> str:
        """Return what it is as part of the name of a folder."""
        short = re.sub(r"[^\w.]+", "-", self.shown).strip("-.")
        return short if len(short) <= _LONGEST_LABEL else short[:_LONGEST_LABEL].rpartition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A combination that is not trained, and why."""

    shown: str
    reason: str
    exit_code: int  # of the fault; 0: another point is the same


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What a command line comes to."""

    flags: tuple[str, ...]  # of Hydra: --config-dir DIR
    words: tuple[str, ...]  # overrides that all points share, without those of the sweep itself
    points: tuple[Point, ...]
    dropped: tuple[Dropped, ...]
    job: Job  # whose sections `sweep`, `submit` and key `run_dir` all others share


def expand(arguments: Sequence[str]) -> Expansion | None:
    """Compose, check and plan every combination, and write nothing; None after --help and its like.

    Raise ConfigError where the words make no sweep, and the first fault where no combination is a job.
    """
    given = [_full(word) for word in arguments if word not in _MULTIRUN]
    combinations = compose.combinations(["--multirun", *given])
    if not combinations:
        return None
    jobs = [found.job for found in combinations if found.job is not None]
    if not jobs:
        raise next(found.fault for found in combinations if found.fault is not None)
    for job in jobs:
        _check(job, first=jobs[0], alone=len(combinations) == 1)
    shared = [word for word in combinations[0].words if all(word in other.words for other in combinations)]
    points, dropped = _sorted_out(combinations, shared)
    return Expansion(
        flags=tuple(compose.split(given)[0]),
        words=tuple(word for word in shared if not word.startswith(_OWN)),
        points=tuple(points),
        dropped=tuple(dropped),
        job=jobs[0],
    )


def pin_words(plan: Plan) -> tuple[str, ...]:
    """Return the words that pin a plan, its engine included."""
    pins = pinned(plan).pins()
    return (f"strategy={plan.strategy}", *(f"plan.{key}={_written(value)}" for key, value in pins.items()))


def trial(job: Job, steps: int) -> Job:
    """Return the job cut short: so many steps, and nothing that a measurement has no use for."""
    return replace(
        job,
        training=replace(
            job.training, num_steps=steps, warmup_steps=min(job.training.warmup_steps, steps - 1)
        ),
        evaluation=replace(job.evaluation, interval=0, num_sequences=0),
        checkpoint=replace(job.checkpoint, interval=0, keep_every=0, save_last=False),
    )


def _full(word: str) -> str:
    return f"sweep.{word}" if word.startswith("top_k=") else word


def _written(value: object) -> str:
    if isinstance(value, str) and not value.isidentifier():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return text_of(value)


# ---- what a sweep may be told -------------------------------------------------------------------------------------


def _check(job: Job, *, first: Job, alone: bool) -> None:
    """Raise ConfigError for what the points of a sweep cannot differ in, and for what no point can be told."""
    for key, one, other in (
        ("submit", job.submit.name, first.submit.name),
        ("run_dir", job.run_dir, first.run_dir),
        *((f"sweep.{key}", getattr(job.sweep, key), getattr(first.sweep, key)) for key in vars(job.sweep)),
    ):
        if one != other:
            raise ConfigError(f"{key}={one} and {key}={other} cannot be in one sweep; give one value")
    _check_place(job)
    if alone and job.sweep.top_k is None:
        raise ConfigError(
            "`meshwright sweep` was given one point; list values, as in plan.micro_batch_size=1,2,4, "
            "or ask for the planner's best with top_k=5"
        )
    steps, warmup = job.sweep.steps, job.monitor.warmup_steps
    if (steps or job.training.num_steps) <= warmup:
        key = "sweep.steps" if steps else "training.num_steps"
        raise ConfigError(
            f"{key}={steps or job.training.num_steps} leaves no step after monitor.warmup_steps={warmup}; "
            f"use {warmup + 5} or more"
        )
    _check_single(job)


def _check_place(job: Job) -> None:
    if job.submit.name not in ("local", "slurm"):
        raise ConfigError(
            f"submit={job.submit.name} starts one run; a sweep trains here with submit=local or "
            "queues its points with submit=slurm"
        )
    if job.submit.name == "local" and job.sweep.max_parallel is not None:
        raise ConfigError(
            f"sweep.max_parallel={job.sweep.max_parallel} is for jobs of submit=slurm; "
            "a sweep here trains one point after the other"
        )


def _check_single(job: Job) -> None:
    """Raise for keys that ask something of one run, or let the plan of a point become another."""
    supervise = job.supervise
    for key, is_set in (
        ("checks", job.checks != ChecksConfig()),
        ("report", job.report is not None),
        ("strategies", job.strategies is not None),
        ("stop_at_step", job.stop_at_step is not None),
        ("supervise.on_out_of_memory", bool(supervise.on_out_of_memory)),
        ("supervise.on_bad_loss", bool(supervise.on_bad_loss)),
        ("supervise.elastic", supervise.elastic),
    ):
        if is_set:
            raise ConfigError(
                f"{key} is set and has no place in a sweep, whose points are measured as they are planned; "
                "leave it out"
            )


# ---- one combination ----------------------------------------------------------------------------------------------


def _sorted_out(combinations: Sequence[Composed], shared: Sequence[str]) -> tuple[list[Point], list[Dropped]]:
    points: list[Point] = []
    dropped: list[Dropped] = []
    for combination in combinations:
        words = tuple(word for word in combination.words if word not in shared)
        for found in _tried(combination, words):
            if isinstance(found, Dropped):
                dropped.append(found)
                continue
            twin = next((point for point in points if _is_same(point.decision, found.decision)), None)
            if twin is None:
                points.append(found)
            else:
                reason = f"is the same as {twin.shown}"
                dropped.append(Dropped(shown=found.shown, reason=reason, exit_code=0))
    return points, dropped


def _tried(combination: Composed, words: tuple[str, ...]) -> Iterator[Point | Dropped]:
    """Yield the points of one combination, or why there is none."""
    brief = [word.removeprefix("plan.") for word in words]
    shown = " ".join(brief)
    try:
        job, plans = _plans(combination)
    except LauncherError as error:
        yield _without(shown, error)
        return
    for plan in plans:
        told = shown if plan is None else " ".join([*brief, describe(plan)])
        try:
            yield Point(words=words, shown=told, decision=_decide(job, plan))
        except LauncherError as error:
            yield _without(told, error)


def _plans(combination: Composed) -> tuple[Job, list[Plan | None]]:
    """Return the job with the plans to try of it; None is whichever the planner chooses."""
    job = combination.job
    if job is None:
        assert combination.fault is not None, "a combination is a job or a fault"
        raise combination.fault
    if job.sweep.top_k is None:
        return job, [None]
    ranking = freeze.rank(job)
    ranking.choose()  # raises where there is none
    return job, [candidate.plan for candidate in ranking.candidates[: job.sweep.top_k]]


def _decide(job: Job, plan: Plan | None) -> Decision:
    if plan is not None:
        job = replace(job, strategy=replace(job.strategy, name=plan.strategy), plan=pinned(plan))
    if job.sweep.steps is not None:
        job = trial(job, job.sweep.steps)
    if job.submit.name == "local" and job.cluster.num_nodes > 1:
        raise ClusterError(
            f"cluster.num_nodes={job.cluster.num_nodes} is more than this host; queue the sweep with submit=slurm"
        )
    decision = freeze.decide(replace(job, sweep=SweepConfig()))
    if job.submit.name == "local":
        local.check_gpus(job.cluster, decision.plan)
    return decision


def _without(shown: str, error: LauncherError) -> Dropped:
    return Dropped(shown=shown, reason=str(error), exit_code=error.exit_code)


def _is_same(one: Decision, other: Decision) -> bool:
    """Tell whether two points would train the same plan in the same place, whatever their words were."""
    here, there = one.job.cluster, other.job.cluster
    is_there = all(
        getattr(here, key) == getattr(there, key)
        for key in ("name", "num_nodes", "gpus_per_node", "partition")
    )
    # What was detected, free memory say, differs from look to look; what was left to the planner is in the plan.
    engine = StrategyConfig(name="")
    jobs = [
        replace(found.job, cluster=here, plan=PlanRequest(), strategy=engine, run_dir=None)
        for found in (one, other)
    ]
    return is_there and one.plan == other.plan and jobs[0] == jobs[1]
