"""Where the points of a sweep stand: measured against predicted, fastest first. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.planner.words.tables import gib_text, seconds_text

HEADER = (
    *("", "point", "nodes", "GPUs", "s/step", "predicted", "off", "tokens/s", "per GPU", "GiB", "planned"),
    "state",
)
WORDS = (1, 11)  # columns that are not figures
LEAST = 3  # points of one engine whose common factor can be told from chance


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What one point was to do, and did."""

    name: str  # of its run directory
    shown: str
    strategy: str
    plan: str  # in words
    num_nodes: int
    num_gpus: int
    tokens_per_step: int
    predicted_s: float  # a step
    predicted_bytes: int
    state: str
    step: int
    num_steps: int
    measured_s: float | None = None  # median step after warm-up
    measured_bytes: int | None = None
    cause: str | None = None  # where it failed
    exit_code: int | None = None

    @property
    def is_finished(self) -> bool:
        """Tell whether there is nothing left to train."""
        return self.state == "finished"

    @property
    def has_failed(self) -> bool:
        """Tell whether it ended before its last step without being asked."""
        return self.state == "failed"

    @property
    def tokens_per_s(self) -> float | None:
        """Measured training speed of all GPUs together."""
        return self.tokens_per_step / self.measured_s if self.measured_s else None

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        """Measured training speed of one GPU."""
        return self.tokens_per_s / self.num_gpus if self.tokens_per_s else None

    @property
    def error(self) -> float | None:
        """How far the predicted step time is off, as a share of the measured one."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s else None


@dataclass(frozen=True, kw_only=True)
class Standings:
    """All points, those with a figure first, and what was not tried."""

    points: tuple[Standing, ...]
    dropped: tuple[Mapping[str, Any], ...]

    @property
    def ranked(self) -> list[Standing]:
        """Points that were measured and have not failed, fastest first."""
        return [point for point in self.points if point.measured_s is not None and not point.has_failed]

    @property
    def is_over(self) -> bool:
        """Tell whether every point has finished or failed."""
        return all(point.is_finished or point.has_failed for point in self.points)

    def winner(self, *, per_gpu: bool = False) -> Standing | None:
        """Return the fastest point, of all its GPUs or of each, if one was measured."""
        return max(self.ranked, key=lambda p: _speed(p, per_gpu=per_gpu), default=None)


def ranked(points: Sequence[Standing], dropped: Sequence[Mapping[str, Any]]) -> Standings:
    """Order points by measured tokens a second; then those that wait, then those that failed."""
    ordered = sorted(points, key=lambda p: (p.has_failed, p.measured_s is None, -_speed(p, per_gpu=False)))
    return Standings(points=tuple(ordered), dropped=tuple(dropped))


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How far predictions of one engine were off in the median, as they are and scaled by the other points."""

    strategy: str
    num_points: int
    before: float
    after: float | None  # None: too few points to tell


def accuracies(standings: Standings) -> list[Accuracy]:
    """Return the accuracy of each engine; a point is scaled by what the others of its engine measured."""
    found = []
    for name in sorted({point.strategy for point in standings.ranked}):
        ratios = [
            point.measured_s / point.predicted_s
            for point in standings.ranked
            if point.strategy == name and point.measured_s is not None
        ]
        after = None
        if len(ratios) >= LEAST:
            others = [ratios[:index] + ratios[index + 1 :] for index in range(len(ratios))]
            after = statistics.median(
                abs(statistics.median(rest) / ratio - 1) for rest, ratio in zip(others, ratios, strict=True)
            )
        before = statistics.median(abs(1 / ratio - 1) for ratio in ratios)
        found.append(Accuracy(strategy=name, num_points=len(ratios), before=before, after=after))
    return found


def sentences(standings: Standings, *, folder: str) -> list[str]:
    """Say which point wins, how good the predictions were, and what they may be scaled by."""
    told = []
    best, thrifty = standings.winner(), standings.winner(per_gpu=True)
    if best is not None:
        told.append(f"fastest   {best.name}: {best.tokens_per_s:,.0f} tokens/s")
    if best is not None and thrifty is not None and thrifty is not best:
        told.append(f"per GPU   {thrifty.name}: {thrifty.tokens_per_s_per_gpu:,.0f} tokens/s/GPU")
    return told + [f"predicted {_words(found, folder=folder)}" for found in accuracies(standings)]


def _words(found: Accuracy, *, folder: str) -> str:
    off = (
        f"{found.strategy}: step times off by {found.before:,.0%} in the median of {found.num_points} points"
    )
    if found.after is None:
        return f"{off}; {LEAST} would tell a common factor"
    if found.after < found.before:
        return f"{off}, by {found.after:,.0%} once scaled by the others; plan.calibration={folder} does that"
    return f"{off}, by {found.after:,.0%} once scaled by the others: no common factor explains them"


def rows(standings: Standings) -> list[tuple[str, ...]]:
    """Return one row a point, under HEADER."""
    places = {point.name: str(place) for place, point in enumerate(standings.ranked, start=1)}
    return [_row(point, places.get(point.name, "-")) for point in standings.points]


def to_json(standings: Standings) -> dict[str, Any]:
    """Return everything as plain data."""
    best, thrifty = standings.winner(), standings.winner(per_gpu=True)
    return {
        "winner": best.name if best else None,
        "winner_per_gpu": thrifty.name if thrifty else None,
        "is_over": standings.is_over,
        "points": [_data(point) for point in standings.points],
        "dropped": [dict(found) for found in standings.dropped],
        "accuracy": [asdict(found) for found in accuracies(standings)],
    }


def state_text(point: Standing) -> str:
    """Return where a point stands, with the cause where it failed."""
    if point.has_failed:
        code = "" if point.exit_code is None else f" ({point.exit_code})"
        return f"failed{code}: {point.cause}"
    return point.state if point.is_finished else f"{point.state}, step {point.step} of {point.num_steps}"


def _row(point: Standing, place: str) -> tuple[str, ...]:
    measured, error = point.measured_s, point.error
    speed, per_gpu = point.tokens_per_s, point.tokens_per_s_per_gpu
    return (
        place,
        point.shown,
        str(point.num_nodes),
        str(point.num_gpus),
        "-" if measured is None else seconds_text(measured),
        seconds_text(point.predicted_s),
        "-" if error is None else f"{error:+,.0%}",
        "-" if speed is None else f"{speed:,.0f}",
        "-" if per_gpu is None else f"{per_gpu:,.0f}",
        "-" if point.measured_bytes is None else gib_text(point.measured_bytes),
        gib_text(point.predicted_bytes),
        state_text(point),
    )


def _data(point: Standing) -> dict[str, Any]:
    return {
        **asdict(point),
        "tokens_per_s": point.tokens_per_s,
        "tokens_per_s_per_gpu": point.tokens_per_s_per_gpu,
        "error": point.error,
    }


def _speed(point: Standing, *, per_gpu: bool) -> float:
    return (point.tokens_per_s_per_gpu if per_gpu else point.tokens_per_s) or 0.0
