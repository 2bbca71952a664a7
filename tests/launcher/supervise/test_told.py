"""What is kept of a failure, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.errors import LostRankError
from launcher.run_dir import RunDir
from launcher.supervise.failure import Failure
from launcher.supervise.told import log_failure

KILLED = Failure(cause="lost_rank", error=LostRankError("rank 1 on h was killed"), rank=1, host="h")


def test_a_failure_is_an_event_and_an_alert_of_its_cause(frozen: Callable[..., RunDir], webhook: Any) -> None:
    run = frozen()
    for step in (7, 9):
        log_failure(run, KILLED, step=step)
    told = [event for event in run.events() if event["event"] == "failed"]
    assert [(event["cause"], event["rank"], event["step"]) for event in told] == [
        ("lost_rank", 1, 7),
        ("lost_rank", 1, 9),
    ]
    assert [(record["cause"], record["step"]) for record in webhook.taken] == [("lost_rank", 7)]


def test_an_export_that_fails_is_nobodys_alert(frozen: Callable[..., RunDir], webhook: Any) -> None:
    run = frozen()
    log_failure(run, KILLED, step=None, event="export_failed")
    assert [event["event"] for event in run.events()] == ["created", "export_failed"]
    assert webhook.taken == []


def test_a_full_disk_hides_no_failure(frozen: Callable[..., RunDir], webhook: Any) -> None:
    run = frozen()
    run.events_file.unlink()
    run.events_file.mkdir()  # as good as a disk that takes no more
    log_failure(run, KILLED, step=None)
    assert webhook.told() == {"lost_rank": 1}
