"""What a whole run takes: days, money, failures, and how often to save. Pure functions of a ranking and the cluster.

Interval and expected time: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps"
(Future Generation Computer Systems 22), equations 20 and 37, which refine Young 1974. Failures: Llama 3 counted 419
unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, section 3.3.4), 51,000 GPU hours each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import strategies as adapters
from launcher.planner.cost import Candidate
from launcher.planner.search.ranking import Ranking


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What training takes under one plan. What depends on a key of the cluster that is not set is None."""

    num_gpus: int
    num_steps: int
    tokens: int
    work_s: float  # all steps, without interruptions
    gpu_hours: float  # the same, over all GPUs
    checkpoint_bytes: float  # weights and optimizer states, once
    save_s: float | None  # needs cluster.storage_gb_per_s
    mttf_s: float | None  # of the whole cluster; needs cluster.mttf_hours_per_gpu
    interval_s: float | None  # between checkpoints
    interval_steps: int | None
    failures: float | None  # to be expected
    expected_s: float  # with checkpoints, lost work and restarts, as far as they are known
    cost: float | None  # of the expected time; needs cluster.price_per_gpu_hour

    @property
    def overhead(self) -> float:
        """Share of the expected time that goes into checkpoints and failures."""
        return 1 - self.work_s / self.expected_s


def budget(ranking: Ranking, candidate: Candidate | None = None) -> Budget:
    """Return what `training.num_steps` steps take under a candidate: the chosen one, unless another is given."""
    candidate = candidate or ranking.choose()
    assert candidate.cost is not None, "a candidate that fits was costed"
    problem, step_s = ranking.problem, candidate.cost.step_s
    cluster, training = problem.cluster, problem.training
    state = adapters.capabilities(candidate.plan.strategy).state_bytes_of(candidate.plan)
    checkpoint_bytes = problem.model.num_parameters * (state.weights + state.optimizer)
    work_s = step_s * training.num_steps
    save_s = mttf_s = interval = None
    expected_s = work_s
    if cluster.storage_gb_per_s is not None:
        save_s = checkpoint_bytes / (cluster.storage_gb_per_s * 1e9)
    if cluster.mttf_hours_per_gpu is not None:
        mttf_s = cluster.mttf_hours_per_gpu * 3600 / cluster.world_size
    if save_s is not None and mttf_s is not None:
        interval = checkpoint_interval_s(save_s=save_s, mttf_s=mttf_s)
        # What is read back is what was written.
        expected_s = expected_seconds(
            work_s=work_s, interval_s=interval, save_s=save_s, restart_s=save_s, mttf_s=mttf_s
        )
    price = cluster.price_per_gpu_hour
    return Budget(
        num_gpus=cluster.world_size,
        num_steps=training.num_steps,
        tokens=training.num_steps * training.tokens_per_step,
        work_s=work_s,
        gpu_hours=work_s * cluster.world_size / 3600,
        checkpoint_bytes=checkpoint_bytes,
        save_s=save_s,
        mttf_s=mttf_s,
        interval_s=interval,
        interval_steps=None if interval is None else max(1, round(interval / step_s)),
        failures=None if mttf_s is None else expected_s / mttf_s,
        expected_s=expected_s,
        cost=None if price is None else expected_s * cluster.world_size / 3600 * price,
    )


def checkpoint_interval_s(*, save_s: float, mttf_s: float) -> float:
    """Return the seconds of work between checkpoints that lose least (Daly 2006, equation 37)."""
    if save_s >= 2 * mttf_s:
        return mttf_s
    share = save_s / (2 * mttf_s)
    return math.sqrt(2 * save_s * mttf_s) * (1 + math.sqrt(share) / 3 + share / 9) - save_s


def expected_seconds(
    *, work_s: float, interval_s: float, save_s: float, restart_s: float, mttf_s: float
) -> float:
    """Return how long `work_s` of work take with failures at random (Daly 2006, equation 20)."""
    if (interval_s + save_s) / mttf_s > 500:
        return math.inf  # no interval is ever finished
    again = math.expm1((interval_s + save_s) / mttf_s)
    return mttf_s * math.exp(restart_s / mttf_s) * again * work_s / interval_s
