"""Who stands still: the age of every rank's last sign of life on one clock, and which rank the others wait for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import heartbeat
from launcher.config import SuperviseConfig
from launcher.heartbeat import Beat, Phase

# The order in which a rank passes these with one count of completed steps.
_ORDER: dict[Phase, int] = {
    "starting": 0,
    "evaluating": 1,
    "saving": 2,
    "warming": 3,
    "stepping": 3,
    "leaving": 4,
}


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Ranks that went without a sign of life for longer than they may."""

    silent_s: float  # of the rank that is silent longest
    limit_s: float
    key: str  # the time-out, by its name in the configuration
    beats: tuple[Beat, ...]  # of all ranks that have reported, the longest silent first
    unreported: tuple[int, ...]  # ranks without a beat since the start


class Watch:
    """Looks at the beats of one start. Only changes count, so clocks of other hosts do not."""

    def __init__(self, folder: Path, policy: SuperviseConfig, *, world_size: int, now: float) -> None:
        self._folder, self._policy = folder, policy
        self._since = dict.fromkeys(range(world_size), now)
        self._beats: dict[int, Beat] = {}

    @property
    def interval_s(self) -> float:
        """How often to look: a hang shall be seen within a tenth of its time-out."""
        return min(1.0, self._policy.step_timeout_s / 20, self._policy.init_timeout_s / 20)

    def look(self, now: float) -> Stall | None:
        """Read all beats; return who stands still for too long, if anybody does."""
        for rank in self._since:
            beat = heartbeat.read(self._folder, rank)
            if beat is not None and beat != self._beats.get(rank):
                self._beats[rank], self._since[rank] = beat, now
        late = [rank for rank, since in self._since.items() if now - since > self._limit(rank)[1]]
        if not late:
            return None
        oldest_first = sorted(self._beats, key=lambda rank: self._since[rank])
        worst = min(late, key=lambda rank: self._since[rank])
        key, limit = self._limit(worst)
        return Stall(
            silent_s=now - self._since[worst],
            limit_s=limit,
            key=key,
            beats=tuple(self._beats[rank] for rank in oldest_first),
            unreported=tuple(rank for rank in self._since if rank not in self._beats),
        )

    def last_beat(self, ranks: range) -> float:
        """Return when one of `ranks` was last seen to give a sign of life, on the clock of `look`."""
        return max(self._since[rank] for rank in ranks)

    def _limit(self, rank: int) -> tuple[str, float]:
        beat = self._beats.get(rank)
        key = "step_timeout_s" if beat is not None and beat.phase == "stepping" else "init_timeout_s"
        return f"supervise.{key}", getattr(self._policy, key)


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """The rank that the others wait for, and how that shows."""

    rank: int
    why: str


def culprit(stall: Stall, *, stopped: Collection[int], busy: Mapping[int, str]) -> Culprit:
    """Name the rank that holds up the others.

    `stopped` are ranks whose processes are stopped (SIGSTOP, a debugger); `busy` maps ranks that are outside of
    PyTorch, and so in no collective, to the line of code they are in.
    """
    if stopped:
        return Culprit(rank=min(stopped), why="its process is stopped (SIGSTOP or a debugger)")
    if stall.unreported:
        return Culprit(rank=stall.unreported[0], why="it has not reported since the start")
    last = min(stall.beats, key=_position)
    behind = [beat for beat in stall.beats if _position(beat) == _position(last)]
    if len(behind) < len(stall.beats):
        ahead = max(stall.beats, key=_position)
        at = f" at {busy[last.rank]}" if last.rank in busy else ""
        return Culprit(
            rank=last.rank,
            why=f"it is {last.phase} after step {last.step}{at}, where rank {ahead.rank} is "
            f"{ahead.phase} after step {ahead.step}",
        )
    if 0 < len(busy) < len(stall.beats):
        rank = min(busy)
        return Culprit(rank=rank, why=f"it is at {busy[rank]}, the others wait inside PyTorch")
    return Culprit(rank=stall.beats[0].rank, why="it is silent longest")


def _position(beat: Beat) -> tuple[int, int]:
    return beat.step, _ORDER[beat.phase]


def step_reached(beats: Sequence[Beat]) -> int:
    """Return how many steps the furthest rank has completed."""
    return max((beat.step for beat in beats), default=0)
