"""Changes to a run between two starts, each frozen as a new plan with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import strategies
from launcher import planner, replan, run_dir
from launcher.checkpoint import LAYOUT
from launcher.config import Job
from launcher.decode import decode, encode
from launcher.errors import LauncherError
from launcher.monitor.metrics import read
from launcher.planner import Goal, PlanRequest, Ranking
from launcher.planner.problem import pinned
from launcher.run_dir import RunDir
from launcher.supervise import ladder
from launcher.supervise.failure import Failure
from launcher.supervise.ladder import Change
from strategies.spec import Plan

# Of the memory predicted for a plan that did not fit; a smaller step would be within the prediction's error.
_CLEARLY_LESS = 0.8
_BATCH = ("dp", "micro_batch_size", "num_microbatches")


def after_failure(run: RunDir, failure: Failure, *, step: int, failed_before: int) -> Change | None:
    """Change what the configuration allows, so that the next start ends better; return what was changed.

    `step` is how many steps were completed, `failed_before` how many starts ended the same way with no step between.
    """
    job, plan = run.job(), run.plan()
    if failure.cause == "out_of_memory":
        offered = strategies.capabilities(plan.strategy)
        changes = ladder.for_memory(plan, offered, job.supervise.on_out_of_memory)
        return next((change for change in changes if _shrink(run, change)), None)
    if failure.cause == "bad_loss":
        change = ladder.for_loss(job, sample=_sample_after(run, job, step), failed_before=failed_before)
        if change is not None and change.job is not None:
            run_dir.reconfigure(run, job=change.job)
            run.log_event("remedied", reason=failure.cause, remedy=change.step, words=list(change.words))
            return change
    return None


def _shrink(run: RunDir, change: Change) -> bool:
    """Adopt a plan that needs less memory; a plan that the planner or the checkpoint refuses is left out."""
    try:
        job = replan.with_words(run.job(), change.words, plan=run.plan())
        request = job.plan if change.plan is None else pinned(change.plan)
        ranking = _rank(job, request, run.plan().strategy)
        if change.plan is None:
            parts = run.plan_data()["predictions"]["memory_bytes_by_part"]
            limit = _CLEARLY_LESS * sum(parts.values())
            fitting = tuple(c for c in ranking.candidates if c.cost and c.cost.memory.total <= limit)
        else:
            wanted = change.plan
            fitting = tuple(c for c in ranking.candidates if not ladder.words(wanted, c.plan))
        if not fitting:
            return False
        ranking = replace(ranking, candidates=fitting)
        replan.adopt(run, job, ranking, words=change.words, reason="out_of_memory", remedy=change.step)
    except LauncherError:
        return False
    return True


def _sample_after(run: RunDir, job: Job, step: int) -> int:
    """Return the first sample of the global batch that `step` completed steps are followed by."""
    lines = read(run.metrics_file)
    sample: int = next((line["consumed_samples"] for line in reversed(lines) if line["step"] == step), 0)
    while sample in job.data.skip_samples:
        sample += job.training.global_batch_size
    return sample


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What a run was planned for before devices went missing."""

    devices: int
    plan: Plan


def whole(run: RunDir) -> Whole:
    """Return the devices and the plan that this run wants; a plan by hand is a new wish."""
    changes = [event for event in run.events() if event["event"] == "replanned"]
    by_hand = max((index for index, event in enumerate(changes) if "reason" not in event), default=-1)
    reduced = [event for event in changes[by_hand + 1 :] if event["reason"] == "devices"]
    if reduced:
        return decode(Whole, reduced[-1]["whole"])
    return Whole(devices=run.job().cluster.gpus_per_node, plan=run.plan())


def for_devices(run: RunDir, devices: int) -> bool:
    """Go on with as many of `devices` ranks as a plan uses; tell whether there is a plan that the checkpoint allows."""
    wanted = whole(run)
    if devices >= wanted.devices:
        return _use(run, wanted, wanted.devices, pinned(wanted.plan))
    if "dp" not in strategies.capabilities(wanted.plan.strategy).reshardable:
        return False
    return any(
        _use(run, wanted, count, request)
        for count in range(devices, 0, -1)
        for request in _requests(wanted.plan)
    )


def _requests(plan: Plan) -> Iterator[PlanRequest]:
    """Yield what to keep of `plan` on fewer ranks: all but the split of the data first, then what files depend on."""
    everything = pinned(plan)
    free = strategies.capabilities(plan.strategy).reshardable
    split = ("pipeline_split",) if "pp" in free else ()  # which names the layers of so many stages
    for given_up in (
        ("dp", "num_microbatches"),
        _BATCH,
        (*_BATCH, *split, *(name for name in LAYOUT if name in free)),
    ):
        yield replace(everything, **dict.fromkeys(given_up))


def _use(run: RunDir, wanted: Whole, count: int, request: PlanRequest) -> bool:
    if count == run.job().cluster.gpus_per_node:
        return True
    words = (f"cluster.gpus_per_node={count}",)
    try:
        job = replan.with_words(run.job(), words, plan=run.plan())
        ranking = _rank(job, request, wanted.plan.strategy)
        # What a person pinned stays in the configuration, for the day when all devices are back.
        replan.adopt(run, job, ranking, words=words, reason="devices", whole=encode(wanted))
    except LauncherError:
        return False
    return True


def _rank(job: Job, request: PlanRequest, strategy: str) -> Ranking:
    return planner.achieve(Goal(), replan.problem(replace(job, plan=request), (strategy,)))
