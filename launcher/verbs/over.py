"""Whether a run is over: one that failed or stopped may be started again by its launcher, or by Slurm."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.errors import ClusterError
from launcher.run_dir import OVER, RunDir, state
from launcher.submit import slurm

_REMEDY_S = 30.0  # in which a launcher tells of a failure, plans anew and says that it starts again
_ASK_S = 5.0  # Slurm's controller has others to answer


class End:
    """Asks after the end of one run."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._asked: float | None = None
        self._jobs_have_ended: bool | None = None  # None: Slurm does not tell

    def has_come(self) -> bool:
        """Tell whether nothing comes any more by itself."""
        events = list(self._run.events())
        if (jobs := slurm.numbers(events)) and (ended := self._ended(jobs)) is not None:
            return ended
        where = state(events)
        return where == "finished" or (where in OVER and time.time() - events[-1]["time"] > _REMEDY_S)

    def _ended(self, jobs: Sequence[str]) -> bool | None:
        now = time.monotonic()
        if self._asked is None or now - self._asked > _ASK_S:
            self._asked = now
            try:
                self._jobs_have_ended = all(slurm.ask(number).has_ended for number in jobs)
            except ClusterError:  # a host that only shares the folder
                self._jobs_have_ended = None
        return self._jobs_have_ended
