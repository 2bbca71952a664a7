"""One save at a time beside the training: a thread, what became of it, and waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from launcher.errors import CheckpointError


class Background:
    """Runs one piece of work; the next one has to wait until this one's end was looked at."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._failure: CheckpointError | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; nothing else may be under way."""
        assert self._thread is None, "look at the last one's end first"
        # A daemon: a rank that dies does not wait for its disk.
        self._thread = Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, *, timeout_s: float | None = None) -> CheckpointError | None:
        """Wait for the end; return what went wrong, once. After a time-out it is still under way."""
        if self._thread is None:
            return None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        self._thread, failure = None, self._failure
        self._failure = None
        return failure

    @property
    def is_busy(self) -> bool:
        """True until the work has ended, well or not."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Tell whether `wait` would return a failure at once."""
        return self._failure is not None and not self.is_busy

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CheckpointError as error:
            self._failure = error
        except BaseException as error:
            # A peer that died takes the group down: whoever waits for this save hears why.
            self._failure = CheckpointError(
                f"the checkpoint under way was not finished: {type(error).__name__}: {error}"
            )
