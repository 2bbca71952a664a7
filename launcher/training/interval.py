"""How often to save, and what share of the time then goes into training: Young 1974, refined by Daly 2006.

Pure functions; the equations are in planner/search/budget.py. Where nobody says how often a cluster fails, Meta's
figures do (Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters", arXiv
2410.21683): 7.9 h between failures of a job of 1,024 GPUs, measured; 1.8 h at 16,384, projected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.cluster.spec import ClusterSpec
from launcher.planner.search.budget import checkpoint_interval_s, expected_seconds

_MEASURED = ((1024, 7.9), (16_384, 1.8))  # GPUs, hours between failures of a job on all of them
# What rank 0's disk is taken to write before a save was measured and where cluster.storage_gb_per_s is null.
ASSUMED_GB_PER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number of steps between checkpoints, and where it comes from."""

    steps: int
    save_s: float  # that training stands still for
    step_s: float
    mttf_s: float
    measured: bool  # save_s and step_s, in this run

    def sentence(self) -> str:
        """Say what was chosen, with every number."""
        origin = "measured" if self.measured else "predicted"
        return (
            f"checkpoint.interval=auto: every {self.steps} steps, from {self.save_s:.2f} s that a save stops training "
            f"and {self.step_s:.3f} s a step ({origin}) and {self.mttf_s / 3600:.1f} h between failures (Young/Daly)"
        )


def mttf_hours(*, num_gpus: int) -> float:
    """Hours between failures of a job: failures per GPU hour as measured for the nearest size, between sizes by log."""
    (small, small_h), (large, large_h) = _MEASURED
    share = math.log(num_gpus / small) / math.log(large / small)
    share = min(1.0, max(0.0, share))
    low, high = math.log(small * small_h), math.log(large * large_h)
    return math.exp(low + share * (high - low)) / num_gpus


def mttf_s(given_hours: float | None, cluster: ClusterSpec) -> float:
    """Seconds between failures: as `checkpoint.mttf_hours` says, as the cluster's key says, or by default."""
    if given_hours is not None:
        return given_hours * 3600
    if cluster.mttf_hours_per_gpu is not None:
        return cluster.mttf_hours_per_gpu * 3600 / cluster.world_size
    return mttf_hours(num_gpus=cluster.world_size) * 3600


def choose(*, save_s: float, step_s: float, mttf_s: float, measured: bool) -> Interval:
    """Return the interval that loses least, in whole steps."""
    seconds = checkpoint_interval_s(save_s=save_s, mttf_s=mttf_s)
    return Interval(
        steps=max(1, round(seconds / step_s)),
        save_s=save_s,
        step_s=step_s,
        mttf_s=mttf_s,
        measured=measured,
    )


def expected_goodput(*, interval_s: float, save_s: float, restart_s: float, mttf_s: float) -> float:
    """Return the share of wall time that goes into steps which count (Daly 2006, equation 20)."""
    wall = expected_seconds(
        work_s=1.0, interval_s=interval_s, save_s=save_s, restart_s=restart_s, mttf_s=mttf_s
    )
    return 1 / wall
