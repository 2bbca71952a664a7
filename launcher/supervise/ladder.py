"""What may be changed so that the next start ends better: a smaller plan, the learning rate, batches; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from launcher.config import Job, LossRemedy, MemoryRemedy
from launcher.planner import PlanRequest
from strategies.base import Capabilities
from strategies.spec import Plan, Recompute

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
# Layers and modules of a kind of recomputation, layers of uneven stages: where they do not apply they are null.
_OPTIONAL = ("recompute_num_layers", "recompute_modules", "pipeline_split")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One step of a ladder: the keys that become others, as words, and the plan or the job they make."""

    step: str
    words: tuple[str, ...]
    plan: Plan | None = None  # None: the planner chooses a plan that needs clearly less
    job: Job | None = None  # where something else than the plan changes


def for_memory(plan: Plan, offered: Capabilities, steps: Sequence[MemoryRemedy]) -> Iterator[Change]:
    """Yield what would make `plan` smaller, in the order of `steps`; the global batch stays as it is."""
    for step in steps:
        if step == "replan":
            yield Change(step=step, words=())
        for smaller in _MEMORY[step](plan, offered) if step in _MEMORY else ():
            if offered.why_not(smaller) is None:
                yield Change(step=step, words=words(plan, smaller), plan=smaller)


def _halved(plan: Plan, offered: Capabilities) -> Iterator[Plan]:
    size = plan.micro_batch_size
    factor = next((prime for prime in range(2, size + 1) if size % prime == 0), None)
    if factor is not None:
        yield replace(plan, micro_batch_size=size // factor, num_microbatches=plan.num_microbatches * factor)


def _recomputed(plan: Plan, offered: Capabilities) -> Iterator[Plan]:
    for kind in _RECOMPUTE[_RECOMPUTE.index(plan.recompute) + 1 :]:
        yield replace(plan, recompute=kind, recompute_num_layers=0, recompute_modules=())
    if plan.recompute == "full" and plan.recompute_num_layers:
        yield replace(plan, recompute_num_layers=0)


def _sharded(plan: Plan, offered: Capabilities) -> Iterator[Plan]:
    for stage in sorted(offered.zero_stages):
        if stage > plan.zero_stage:
            yield replace(plan, zero_stage=stage)


def _offloaded(plan: Plan, offered: Capabilities) -> Iterator[Plan]:
    if not plan.offload_optimizer:
        yield replace(plan, offload_optimizer=True)
    if not plan.offload_parameters:
        yield replace(plan, offload_optimizer=True, offload_parameters=True)


_MEMORY: Mapping[MemoryRemedy, Callable[[Plan, Capabilities], Iterator[Plan]]] = {
    "halve_micro_batch": _halved,
    "more_recompute": _recomputed,
    "shard_more": _sharded,
    "offload": _offloaded,
}


def for_loss(job: Job, *, sample: int, failed_before: int) -> Change | None:
    """Return what the steps for a bad loss say at the batch that begins with `sample`; a step that did not help gives
    way to the next one, the last one stays: the supervisor counts how often.
    """
    steps = job.supervise.on_bad_loss
    if not steps:
        return None
    step: LossRemedy = steps[min(failed_before, len(steps) - 1)]
    if step == "skip_batch":
        skipped = (*job.data.skip_samples, sample)
        changed = replace(job, data=replace(job.data, skip_samples=skipped))
        word = f"data.skip_samples=[{','.join(map(str, skipped))}]"
    else:
        training = job.training
        rate = training.learning_rate / 2
        lowest = min(training.min_learning_rate, rate)
        changed = replace(job, training=replace(training, learning_rate=rate, min_learning_rate=lowest))
        word = f"training.learning_rate={rate:g}"
    return Change(step=step, words=(word,), job=changed)


def words(before: Plan, after: Plan) -> tuple[str, ...]:
    """Return in which keys two plans differ, as a person would write them."""
    changed = [f.name for f in fields(PlanRequest) if getattr(before, f.name) != getattr(after, f.name)]
    return tuple(f"plan.{name}={_text(name, getattr(after, name))}" for name in changed)


def _text(name: str, value: object) -> str:
    if name in _OPTIONAL and not value:
        return "null"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
