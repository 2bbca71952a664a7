"""A failure, once somebody has found out what it was: an event of the run, and an alert."""

from __future__ import annotations

from contextlib import suppress

from launcher.monitor.alerts import tell_failure
from launcher.run_dir import RunDir
from launcher.supervise.failure import Failure


def log_failure(run: RunDir, failure: Failure, *, step: int | None, event: str = "failed") -> None:
    """Keep what is known of a failure; one of training is told to whom alerts go, once a cause."""
    facts = {
        "type": type(failure.error).__name__,
        "message": str(failure.error),
        "exit_code": failure.error.exit_code,
        "cause": failure.cause,
        "rank": failure.rank,
        "host": failure.host,
        "frame": failure.frame,
        "step": step,
    }
    with suppress(OSError):  # a full disk: the person still hears of it
        run.log_event(event, **facts)
    if event == "failed":
        tell_failure(run.metrics, facts, repeat_s=run.job().monitor.alerts.repeat_s)
