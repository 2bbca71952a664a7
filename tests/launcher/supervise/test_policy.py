from __future__ import annotations

from typing import get_args

import pytest

from launcher.config import SuperviseConfig
from launcher.supervise.policy import Attempt, Cause, decide, failed_alike

POLICY = SuperviseConfig(max_restarts=5, max_fruitless=3, backoff_s=4, backoff_max_s=6)
REPEATING = {
    "user_error",
    "plan_impossible",
    "out_of_memory",
    "bad_loss",
    "storage_full",
    "corrupt_checkpoint",
}


def lost(*, progressed: bool) -> Attempt:
    return Attempt(cause="lost_rank", progressed=progressed)


@pytest.mark.parametrize("cause", get_args(Cause))
def test_what_would_repeat_is_never_tried_again(cause: Cause) -> None:
    assert decide(POLICY, [Attempt(cause=cause, progressed=True)]).again == (cause not in REPEATING)


@pytest.mark.parametrize("cause", ["out_of_memory", "bad_loss"])
def test_what_was_remedied_is_tried_again(cause: Cause) -> None:
    assert decide(POLICY, [Attempt(cause=cause, progressed=False, remedied=True)]).again


def test_the_next_start_comes_at_once_after_progress_and_later_after_none() -> None:
    attempts = [lost(progressed=True)]
    assert decide(POLICY, attempts).delay_s == 0
    attempts.append(lost(progressed=False))
    assert decide(POLICY, attempts).delay_s == 4
    attempts.append(lost(progressed=False))
    assert decide(POLICY, attempts).delay_s == 6  # not 8: backoff_max_s
    attempts.append(lost(progressed=True))
    assert decide(POLICY, attempts).delay_s == 0


def test_three_starts_without_a_step_are_enough() -> None:
    decision = decide(POLICY, [lost(progressed=True), *[lost(progressed=False)] * 3])
    assert not decision.again
    assert decision.why == "3 starts in a row made no new step (supervise.max_fruitless=3)"


def test_restarts_are_bounded_even_with_progress() -> None:
    assert decide(POLICY, [lost(progressed=True)] * 5).again
    decision = decide(POLICY, [lost(progressed=True)] * 6)
    assert (decision.again, decision.why) == (False, "supervise.max_restarts=5 are used up")
    assert not decide(SuperviseConfig(max_restarts=0), [lost(progressed=True)]).again


def test_a_ladder_may_go_down_many_steps_but_a_bad_loss_may_not_stay() -> None:
    smaller = Attempt(cause="out_of_memory", progressed=False, remedied=True)
    assert decide(POLICY, [smaller] * 5).again
    bad = Attempt(cause="bad_loss", progressed=False, remedied=True)
    assert decide(POLICY, [bad] * 2).again
    assert not decide(POLICY, [bad] * 3).again


def test_failures_alike_are_counted_back_to_the_one_that_came_further() -> None:
    bad, stuck = (
        Attempt(cause="bad_loss", progressed=progressed, remedied=True) for progressed in (True, False)
    )
    assert failed_alike([], "bad_loss") == 0
    assert failed_alike([bad, bad, stuck], "bad_loss") == 2
    assert failed_alike([bad, stuck, lost(progressed=False)], "bad_loss") == 0
