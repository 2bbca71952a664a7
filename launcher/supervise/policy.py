"""What happens after a failure: start again, when, or not; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.config import SuperviseConfig

Cause = Literal[
    "user_error",
    "plan_impossible",
    "out_of_memory",
    "lost_rank",
    "lost_node",
    "hang",
    "collective_timeout",
    "bad_loss",
    "storage_full",
    "corrupt_checkpoint",
    "unknown",
]
# A fresh start would end as this one did, until a person or a remedy changes something; why, where the fault itself
# does not say what to do.
_REPEATS: dict[Cause, str] = {
    "user_error": "",
    "plan_impossible": "",
    "out_of_memory": "the same plan needs the same memory, and supervise.on_out_of_memory allows no smaller one",
    "bad_loss": "the same steps give the same loss, and supervise.on_bad_loss allows no change",
    "storage_full": "",
    "corrupt_checkpoint": "",
}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start that failed."""

    cause: Cause
    progressed: bool  # a step further than any start before, or a newer checkpoint
    remedied: bool = False  # something was changed before the next start


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to start again."""

    again: bool
    delay_s: float = 0.0
    why: str = ""  # not: the reason, as the end of a sentence


def decide(policy: SuperviseConfig, attempts: Sequence[Attempt]) -> Decision:
    """Decide after the last of `attempts`, all those of this launcher."""
    last = attempts[-1]
    if last.cause in _REPEATS and not last.remedied:
        return Decision(again=False, why=_REPEATS[last.cause])
    if len(attempts) > policy.max_restarts:
        return Decision(again=False, why=f"supervise.max_restarts={policy.max_restarts} are used up")
    fruitless = _fruitless(attempts)
    if fruitless >= policy.max_fruitless:
        return Decision(
            again=False,
            why=f"{fruitless} starts in a row made no new step (supervise.max_fruitless={policy.max_fruitless})",
        )
    delay = policy.backoff_s * 2 ** (fruitless - 1) if fruitless else 0.0
    return Decision(again=True, delay_s=min(delay, policy.backoff_max_s))


def failed_alike(attempts: Sequence[Attempt], cause: Cause) -> int:
    """Count the starts at the end that failed for `cause` one after the other, none further than the first."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.cause != cause:
            break
        count += 1
        if attempt.progressed:
            break
    return count


def _fruitless(attempts: Sequence[Attempt]) -> int:
    """Count the starts at the end that led nowhere; a smaller plan may fail a few times before one fits."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.progressed or (attempt.remedied and attempt.cause == "out_of_memory"):
            break
        count += 1
    return count
