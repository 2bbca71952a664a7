"""Signals that ask a run to end: the first one with a checkpoint, the second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from launcher.errors import FINISHED, HUNG_UP, INTERRUPTED, TERMINATED
from launcher.run_dir import RunDir

EXIT_CODES = {signal.SIGHUP: HUNG_UP, signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
_ANNOUNCEMENT = b"meshwright: stopping after this step with a checkpoint; once more to end at once\n"
_SLICE_S = 0.2
_STDERR = 2


@dataclass
class StopRequests:
    """Signals seen while a run is supervised; `process` are the workers of the moment."""

    run: RunDir
    exporting: bool = False
    only_here: frozenset[signal.Signals] = (
        frozenset()
    )  # these ask this launcher to leave, and not the run to end
    process: subprocess.Popen[bytes] | None = None
    received: signal.Signals | None = None
    count: int = 0
    leaves: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.received = self.received or signal.Signals(number)
        if number in self.only_here:
            self.leaves = True
            return
        if self.count == 1 and not self.exporting:
            # Whatever is raised here would come up wherever the launcher is at this moment and end it; print may,
            # where the terminal went away or another print was interrupted.
            with suppress(OSError):
                self.run.stop_file.touch()
            with suppress(OSError):
                os.write(_STDERR, _ANNOUNCEMENT)
        elif self.process is not None:
            # torchrun passes SIGTERM on to its ranks; the third request does not ask anybody.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM if self.count <= 2 else signal.SIGKILL)

    @property
    def exit_code(self) -> int:
        """What the launcher leaves with after a request; for the stop file that is 0."""
        return FINISHED if self.received is None else EXIT_CODES[self.received]

    def asked(self) -> bool:
        """Tell whether anybody wants this run to end: by a signal, or by the stop file."""
        return self.received is not None or self.run.stop_file.exists()

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond a request."""
        until = time.monotonic() + seconds
        while not self.asked() and (left := until - time.monotonic()) > 0:
            time.sleep(min(_SLICE_S, left))


@contextmanager
def handling(requests: StopRequests) -> Iterator[None]:
    """Let the signals go to `requests` inside, but for those that we were told to ignore (nohup, a job behind `&`)."""
    heard = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, requests) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
