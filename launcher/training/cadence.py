"""When the next checkpoint is due; with checkpoint.interval=auto decided on rank 0 and frozen in an event."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import strategies
from launcher.config import Job
from launcher.run_dir import RunDir, since_replanned
from launcher.training import interval
from launcher.training.interval import Interval
from strategies.spec import Plan

if TYPE_CHECKING:
    from launcher.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Cadence:
    """The steps after which to save. Every rank makes the same calls in the same order."""

    run: RunDir
    job: Job
    plan: Plan
    ranks: Ranks
    _steps: int = 0
    _measured: bool = False
    _restart_s: float = 0.0

    def begin(self) -> None:
        """Decide for this start: what is pinned, what an earlier start measured, or what is predicted."""
        if self.ranks.rank == 0:
            self._restart_s = self._since_launch()
        given = self.job.checkpoint.interval
        if given != "auto":
            self._steps = given
            return
        frozen = self._frozen() if self.ranks.rank == 0 else None
        chosen = frozen or (self._predicted() if self.ranks.rank == 0 else None)
        chosen = self.ranks.broadcast(chosen)
        assert chosen is not None
        self._steps, self._measured = chosen.steps, chosen.measured
        if self.ranks.rank == 0:
            logger.info(chosen.sentence())
            if frozen is None:
                self._freeze(chosen)

    def is_due(self, step: int) -> bool:
        """Tell whether to save after this step."""
        return self._steps > 0 and step % self._steps == 0

    def measured(self, *, save_s: float | None, step_s: float) -> None:
        """Take what the first save cost: the interval follows it once, and the expected goodput is said.

        `save_s` None: this one does not tell what those to come will cost.
        """
        save_s = None if self._measured else self.ranks.broadcast(save_s)
        if save_s is None:
            return
        self._measured = True
        mttf_s = interval.mttf_s(self.job.checkpoint.mttf_hours, self.job.cluster)
        chosen = interval.choose(save_s=save_s, step_s=step_s, mttf_s=mttf_s, measured=True)
        chosen = self.ranks.broadcast(chosen)
        if self.job.checkpoint.interval == "auto":
            self._steps = chosen.steps
            if self.ranks.rank == 0:
                logger.info(chosen.sentence())
                self._freeze(chosen)
        if self.ranks.rank == 0 and self._steps:
            expected = interval.expected_goodput(
                interval_s=self._steps * step_s, save_s=save_s, restart_s=self._restart_s, mttf_s=mttf_s
            )
            logger.info(
                "expected goodput %.1f %%: a checkpoint every %d steps, %.1f h between failures, %.0f s to start again",
                *(100 * expected, self._steps, mttf_s / 3600, self._restart_s),
            )

    def _predicted(self) -> Interval:
        cluster, model = self.job.cluster, self.job.model
        state = strategies.capabilities(self.plan.strategy).state_bytes_of(self.plan)
        rate = (cluster.storage_gb_per_s or interval.ASSUMED_GB_PER_S) * 1e9
        return interval.choose(
            save_s=model.num_parameters * (state.weights + state.optimizer) / rate,
            step_s=self.run.plan_data()["predictions"]["step_s"],
            mttf_s=interval.mttf_s(self.job.checkpoint.mttf_hours, cluster),
            measured=False,
        )

    def _frozen(self) -> Interval | None:
        events = since_replanned(list(self.run.events()))
        found = next((event for event in reversed(events) if event["event"] == "interval"), None)
        return None if found is None else Interval(**{f.name: found[f.name] for f in fields(Interval)})

    def _freeze(self, chosen: Interval) -> None:
        self.run.log_event("interval", **{f.name: getattr(chosen, f.name) for f in fields(Interval)})

    def _since_launch(self) -> float:
        launched = [event["time"] for event in self.run.events() if event["event"] == "launched"]
        return time.time() - launched[-1] if launched else 0.0
