"""`monitor.profile=[first,last]`: a Chrome trace of each rank over these steps, and a summary of all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from launcher.files import write_whole
from launcher.monitor.observe import Peers
from launcher.monitor.trace import STEP, figures, summarise

_log = logging.getLogger(__name__)


class Profiler(Protocol):
    """PyTorch's profiler, as far as it is needed."""

    def start(self) -> None: ...

    def stop(self, path: Path) -> None:
        """Stop, and write the trace."""

    def mark(self, name: str) -> AbstractContextManager[Any]:
        """Name a stretch of the trace."""


class Tracing:
    """Every rank enters `step` around each of its steps; inside the window the profiler runs."""

    def __init__(
        self,
        window: Sequence[int],
        *,
        directory: Path,
        peers: Peers,
        open_profiler: Callable[[], Profiler] | None,
    ) -> None:
        self._window = tuple(window) if open_profiler is not None else ()
        self._directory, self._peers, self._open = directory, peers, open_profiler
        self._profiler: Profiler | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surround one step; behind the last one of the window the traces are written, outside the step."""
        if not self._window or not self._window[0] <= number <= self._window[1]:
            yield
            return
        if number == self._window[0]:
            assert self._open is not None
            self._profiler = self._open()
            self._profiler.start()
        if self._profiler is None:  # resumed inside the window: half a window is none
            yield
            return
        with self._profiler.mark(f"{STEP}{number}"):
            yield

    def after(self, number: int) -> dict[str, Any]:
        """Write traces and summary behind the last step of the window; every rank has to call it.

        Returns what it adds to that step's metrics.
        """
        if self._profiler is None or number != self._window[1]:
            return {}
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank_{self._peers.rank:05d}.json"
        self._profiler.stop(path)
        self._profiler = None
        own = summarise(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"])
        found = self._peers.gather(own)
        if self._peers.rank == 0:
            summary = {"first_step": self._window[0], "last_step": self._window[1], "ranks": found}
            write_whole(self._directory / "summary.json", json.dumps(summary, indent=2) + "\n")
            _log.info("%s", told(found, directory=self._directory))
        return figures(found)


def told(ranks: Sequence[dict[str, Any]], *, directory: Path) -> str:
    """Say in one line what the mean rank's step consisted of."""
    parts = ("compute", "communication", "exposed communication", "idle")
    means = {part: sum(rank[part] for rank in ranks) / len(ranks) for part in ("step", *parts)}
    words = ", ".join(f"{part} {means[part]:.4g} s" for part in parts)
    return f"traced steps of {means['step']:.4g} s: {words}; traces for Perfetto in {directory}"
