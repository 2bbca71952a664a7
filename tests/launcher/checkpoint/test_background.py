from __future__ import annotations

import threading

from launcher.checkpoint.background import Background
from launcher.errors import CheckpointError


def test_work_runs_beside_and_is_waited_for() -> None:
    background, may_end = Background(), threading.Event()

    def work() -> None:
        may_end.wait(60)

    background.start(work)
    assert background.is_busy
    assert background.wait(timeout_s=0.01) is None
    assert background.is_busy
    may_end.set()
    assert background.wait() is None
    assert not background.is_busy


def test_a_failure_is_told_once() -> None:
    background = Background()

    def fail() -> None:
        raise CheckpointError("no space")

    background.start(fail)
    while background.is_busy:
        pass
    assert background.has_failed
    assert str(background.wait()) == "no space"
    assert background.wait() is None
    assert not background.has_failed


def test_whatever_goes_wrong_becomes_a_sentence() -> None:
    background = Background()
    background.start(lambda: [][0])
    assert "was not finished: IndexError: list index out of range" in str(background.wait())
