"""What a whole run takes, in words: time, GPU hours, checkpoints, failures, money. Pure."""

from __future__ import annotations

import math
from typing import Any

from launcher.decode import encode
from launcher.planner.search.budget import Budget, budget
from launcher.planner.search.ranking import Ranking
from launcher.planner.words.tables import count_text, gib_text, percent_text

_UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def run_words(ranking: Ranking) -> list[str]:
    """Return one sentence for each thing that is known of the whole run under the chosen plan."""
    found = budget(ranking)
    words = [
        f"{found.num_steps:,} steps over {count_text(found.tokens)} tokens: {duration_text(found.work_s)} of work, "
        f"{found.gpu_hours:,.0f} GPU hours on {found.num_gpus:,} GPUs",
        _checkpoints(found),
    ]
    if found.interval_s is not None:
        words.append(_interval(found))
    if found.cost is not None:
        words.append(
            f"cost {found.cost:,.0f} at cluster.price_per_gpu_hour={ranking.problem.cluster.price_per_gpu_hour:g}"
        )
    return words


def to_json(ranking: Ranking) -> dict[str, Any]:
    """Return the figures."""
    data: dict[str, Any] = encode(budget(ranking))
    return data


def duration_text(seconds: float) -> str:
    """Write a duration in its largest unit that it fills."""
    if math.isinf(seconds):
        return "no end"
    for length, unit in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _checkpoints(found: Budget) -> str:
    size = f"a checkpoint of weights and optimizer states holds {gib_text(found.checkpoint_bytes)} GiB"
    if found.save_s is None:
        return f"{size}; cluster.storage_gb_per_s=null: how long it takes is not known"
    if found.mttf_s is None:
        return (
            f"{size} and takes {duration_text(found.save_s)}; "
            "cluster.mttf_hours_per_gpu=null: failures are not counted"
        )
    return (
        f"{size} and takes {duration_text(found.save_s)}; a failure comes every {duration_text(found.mttf_s)}"
    )


def _interval(found: Budget) -> str:
    """Say how often to save, and what failures make of the time."""
    assert found.interval_s is not None and found.failures is not None, "both follow from the same keys"
    if math.isinf(found.expected_s):
        return "failures come faster than checkpoints are written: the run would never end"
    return (
        f"saved every {duration_text(found.interval_s)} (checkpoint.interval={found.interval_steps}) the run takes "
        f"{duration_text(found.expected_s)} with {found.failures:.1f} failures, {percent_text(found.overhead)} of it "
        "for checkpoints and lost work"
    )
