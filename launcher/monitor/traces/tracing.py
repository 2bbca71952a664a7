"""Traced steps: `monitor.profile=[first,last]` keeps traces, `monitor.trace_interval=N` single steps' figures alone."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from launcher.files import write_whole
from launcher.monitor.config import MonitorConfig
from launcher.monitor.observe import Peers
from launcher.monitor.traces.groups import attributed, named
from launcher.monitor.traces.trace import STEP, figures, summarise
from strategies.spec import Plan

_log = logging.getLogger(__name__)


class Profiler(Protocol):
    """PyTorch's profiler, as far as it is needed."""

    def start(self) -> None: ...

    def mark(self, name: str) -> AbstractContextManager[Any]:
        """Name a stretch of the trace."""

    def stop(self, path: Path) -> None:
        """Stop, and write the trace."""

    def collectives(self) -> Sequence[tuple[str, str]]:
        """Return event and group of what gloo was asked for meanwhile, in order."""


class Team(Peers, Protocol):
    """The ranks that are traced together."""

    def barrier(self) -> None: ...


class Tracing:
    """Every rank enters `step` around each of its steps, and calls `after` behind it; at some the profiler runs."""

    def __init__(
        self,
        config: MonitorConfig,
        *,
        plan: Plan,
        directory: Path,
        team: Team,
        open_profiler: Callable[[], Profiler] | None,
    ) -> None:
        self._window, self._interval = tuple(config.profile), config.trace_interval
        self._warm = max(1, config.warmup_steps)  # first steps of a start, which compile and allocate
        self._plan, self._directory, self._team, self._open = plan, directory, team, open_profiler
        self._seen = 0
        self._last = 0  # step that the running profiler stops behind
        self._profiler: Profiler | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surround one step."""
        self._seen += 1
        if self._profiler is None and self._open is not None and (last := self._last_from(number)):
            self._last, self._profiler = last, self._open()
            self._profiler.start()
            self._team.barrier()  # or one rank's late start would pass for another's communication
        if self._profiler is None:
            yield
            return
        with self._profiler.mark(f"{STEP}{number}"):
            yield

    def after(self, number: int) -> dict[str, Any]:
        """Turn a finished trace into figures; every rank has to call it. Return what a step's metrics get from it."""
        if self._profiler is None:
            return {}
        if number != self._last:
            return {"traced": True}
        profiler, self._profiler = self._profiler, None
        if number == self._window_end:
            self._directory.mkdir(parents=True, exist_ok=True)
            found = self._summaries(profiler, self._directory / f"rank_{self._team.rank:05d}.json")
            self._keep(found)
        else:
            with tempfile.TemporaryDirectory(prefix="meshwright-") as aside:
                found = self._summaries(profiler, Path(aside) / "trace.json")
        return {"traced": True, **(figures(found) if found else {})}

    @property
    def _window_end(self) -> int:
        return self._window[1] if self._window else 0

    def _last_from(self, number: int) -> int:
        """Return the last step of the trace that begins at this one, or 0."""
        if self._window and number == self._window[0]:
            return self._window[1]
        if self._window and self._window[0] < number <= self._window[1]:
            return 0  # resumed inside the window: half a window is none
        due = self._interval > 0 and number % self._interval == 0 and self._seen > self._warm
        return number if due else 0

    def _summaries(self, profiler: Profiler, path: Path) -> list[dict[str, Any]]:
        """Write the trace, and return what each rank's says."""
        try:
            own = self._summary(profiler, path)
        except (OSError, ValueError) as error:  # a full disk is no reason to end the run
            _log.warning("the trace of step %d is lost: %s", self._last, error)
            own = None
        return [summary for summary in self._team.gather(own) if summary is not None]

    def _summary(self, profiler: Profiler, path: Path) -> dict[str, Any]:
        profiler.stop(path)
        trace: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        groups = named(trace.get("distributedInfo", {}).get("pg_config", ()), self._plan)
        events = attributed(trace["traceEvents"], profiler.collectives(), self._plan)
        return summarise(events, groups=groups)

    def _keep(self, found: Sequence[dict[str, Any]]) -> None:
        if self._team.rank == 0 and found:
            summary = {"first_step": self._window[0], "last_step": self._window[1], "ranks": found}
            write_whole(self._directory / "summary.json", json.dumps(summary, indent=2) + "\n")
            _log.info("%s", told(found, directory=self._directory))


def told(ranks: Sequence[dict[str, Any]], *, directory: Path) -> str:
    """Say in one line what the mean rank's step consisted of."""
    parts = ("compute", "communication", "exposed communication", "idle")
    means = {part: sum(rank[part] for rank in ranks) / len(ranks) for part in ("step", *parts)}
    words = ", ".join(f"{part} {means[part]:.4g} s" for part in parts)
    return f"traced steps of {means['step']:.4g} s: {words}; traces for Perfetto in {directory}"
