"""Losses of several engines held against those of the first one: how far they are apart, and where. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import CheckFailed

HEADER = ("engine", "first loss", "last loss", "largest deviation", "at step", "plan", "versions")
WORDS = (0, 5, 6)  # columns that are not figures


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one engine made of the same model, data and seed."""

    strategy: str
    plan: str  # in words
    versions: Mapping[str, str]
    losses: Mapping[int, float]  # by step


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Curves of the same steps; the first is the one that the others are measured by."""

    curves: tuple[Curve, ...]
    max_deviation: float | None = None  # relative; None: anything goes

    def __post_init__(self) -> None:
        first = self.curves[0]
        for curve in self.curves:
            if not curve.losses or curve.losses.keys() != first.losses.keys():
                raise CheckFailed(
                    f"{curve.strategy} has losses of {len(curve.losses)} steps and {first.strategy} of "
                    f"{len(first.losses)}, so they cannot be compared; let every run end"
                )

    @property
    def steps(self) -> list[int]:
        """The steps compared, ascending."""
        return sorted(self.curves[0].losses)

    def deviations(self, curve: Curve) -> dict[int, float]:
        """Return by step how far a loss is from the first engine's, as a share of that one."""
        first = self.curves[0].losses
        return {step: _relative(curve.losses[step], first[step]) for step in self.steps}

    def largest(self, curve: Curve) -> tuple[int, float]:
        """Return the first step with the largest deviation, and the deviation."""
        found = self.deviations(curve)
        # What is no number is beyond any other.
        step = max(found, key=lambda step: (math.isnan(found[step]), found[step], -step))
        return step, found[step]

    def check(self) -> None:
        """Raise CheckFailed where an engine is further off than `max_deviation`."""
        for curve in self.curves[1:]:
            step, deviation = self.largest(curve)
            if self.max_deviation is not None and not deviation <= self.max_deviation:
                raise CheckFailed(
                    f"checks.max_deviation={self.max_deviation:g}: the loss of {curve.strategy} is off from that of "
                    f"{self.curves[0].strategy} by {deviation:.2g} (relative) at step {step}, {curve.losses[step]} "
                    f"instead of {self.curves[0].losses[step]}; set training.precision=fp32 for both, or allow more"
                )

    @property
    def verdict(self) -> str:
        """Say in one sentence how far the engines are apart."""
        apart = {curve.strategy: self.largest(curve) for curve in self.curves[1:]}
        worst = max(apart, key=lambda name: (math.isnan(apart[name][1]), apart[name][1]))
        step, deviation = apart[worst]
        limit = (
            "" if self.max_deviation is None else f"; checks.max_deviation={self.max_deviation:g} allows that"
        )
        if self.max_deviation is not None and not deviation <= self.max_deviation:
            limit = f", more than checks.max_deviation={self.max_deviation:g}"
        return (
            f"over {len(self.steps)} steps no loss is further from that of {self.curves[0].strategy} than "
            f"{deviation:.2g} (relative; {worst}, step {step}){limit}"
        )


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return one row an engine, under HEADER."""
    return [_row(comparison, curve) for curve in comparison.curves]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data, every loss included."""
    return {
        "reference": comparison.curves[0].strategy,
        "max_deviation": comparison.max_deviation,
        "num_steps": len(comparison.steps),
        "verdict": comparison.verdict,
        "engines": [_data(comparison, curve) for curve in comparison.curves],
    }


def to_markdown(comparison: Comparison, *, title: str, command: str, picture: str) -> str:
    """Return a page: what was run, the picture, and the table."""
    lines = [HEADER, ("---",) * len(HEADER), *rows(comparison)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    verdict = comparison.verdict
    return (
        f"# {title}\n\n```bash\n{command}\n```\n\n![losses by step, and how far they are apart]({picture})\n\n"
        f"{verdict[0].upper()}{verdict[1:]}.\n\n{table}\n"
    )


def _row(comparison: Comparison, curve: Curve) -> tuple[str, ...]:
    ends = (f"{curve.losses[step]:.6f}" for step in (comparison.steps[0], comparison.steps[-1]))
    versions = ", ".join(f"{name} {version}" for name, version in curve.versions.items())
    step, deviation = comparison.largest(curve)
    apart = ("-", "-") if curve is comparison.curves[0] else (f"{deviation:.2g}", str(step))
    return (curve.strategy, *ends, *apart, curve.plan, versions)


def _data(comparison: Comparison, curve: Curve) -> dict[str, Any]:
    step, deviation = comparison.largest(curve)
    return {
        "strategy": curve.strategy,
        "plan": curve.plan,
        "versions": dict(curve.versions),
        "largest_deviation": deviation,
        "at_step": step,
        "losses": [curve.losses[step] for step in comparison.steps],
    }


def _relative(loss: float, reference: float) -> float:
    if loss == reference:
        return 0.0
    return abs(loss - reference) / abs(reference) if reference else math.inf
