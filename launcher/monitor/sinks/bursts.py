"""One writer behind a thread: finished steps wait for it and go over in bursts, so that no step waits for a sink."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from launcher.monitor.metrics import StepMetrics, sentence

# A burst costs a third to a quarter of what its steps cost one by one: caches, sockets and W&B's service stay warm.
EVERY_S = 1.0
PATIENCE_S = 300.0  # a writer that takes nothing for so long is given up: servers are restarted now and then
_STALL_S = 5.0  # what a checkpoint waits for a writer
_PARTING_S = 60.0  # what the end of a run waits for one
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes finished steps, in order."""

    def write(self, steps: Sequence[StepMetrics]) -> None: ...

    def close(self) -> None: ...


class Bursts:
    """Passes steps on to a writer. One that fails or hangs is given up with a single line: training matters more."""

    def __init__(
        self, name: str, writer: Writer, *, every_s: float = EVERY_S, patience_s: float = PATIENCE_S
    ) -> None:
        self.writer = writer
        self._name, self._every_s, self._patience_s = name, every_s, patience_s
        self._changed = threading.Condition()
        self._waiting: list[StepMetrics] = []  # the writer has not said yet that it has them
        self._since = 0.0  # when the oldest of them came
        self._is_hurried = self._is_closing = False
        self.is_off = False
        self._thread = threading.Thread(target=self._run, name=f"meshwright-{name}", daemon=True)
        self._thread.start()

    def write(self, metrics: StepMetrics) -> None:
        """Leave one step for the next burst."""
        with self._changed:
            if self.is_off:
                return
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.append(metrics)
            if time.monotonic() - self._since > self._patience_s:
                self._give_up(f"it has taken nothing for {self._patience_s:g} s")

    def flush(self) -> None:
        """Return once the writer has every step so far; where it takes too long, it may miss them at a restart."""
        with self._changed:
            self._settle(_STALL_S)

    def close(self) -> None:
        """Flush and close; closing twice is fine. A writer that was given up is left alone."""
        with self._changed:
            if not self._settle(_PARTING_S):
                self._give_up(f"it has not taken the last steps within {_PARTING_S:g} s")
            if self.is_off or self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()
        try:
            self.writer.close()
        except Exception as error:
            _log.warning("%s could not be closed: %s", self._name, sentence(error))

    def _settle(self, seconds: float) -> bool:
        self._is_hurried = True
        self._changed.notify_all()
        return self._changed.wait_for(lambda: self.is_off or not self._waiting, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_hurried or self._is_closing, self._every_s)
                self._is_hurried = False
                burst = list(self._waiting)
                if self.is_off or (self._is_closing and not burst):
                    return
            if burst:
                self._pass_on(burst)

    def _pass_on(self, burst: Sequence[StepMetrics]) -> None:
        try:
            self.writer.write(burst)
        except Exception as error:
            with self._changed:
                self._give_up(sentence(error))
            return
        with self._changed:
            del self._waiting[: len(burst)]
            self._since = time.monotonic()
            self._changed.notify_all()

    def _give_up(self, why: str) -> None:
        if self.is_off:
            return
        self.is_off = True
        _log.warning("%s is off from step %d on: %s", self._name, self._waiting[0].step, why)
        self._waiting.clear()
        self._changed.notify_all()
