"""What a finished run teaches: measured over predicted, as factors on the cost of plans of its kind. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from launcher.planner.cost import MemoryCost, TimeCost, parts

Cost = TypeVar("Cost", MemoryCost, TimeCost)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Factors from one run, for the same model, engine, precision and kind of device."""

    time: float
    memory: float
    run: str  # its folder
    date: str  # UTC, ISO 8601: when its steps were measured
    host: str

    def __post_init__(self) -> None:
        for key in ("time", "memory"):
            if not getattr(self, key) > 0:
                raise ValueError(f"calibration.{key}={getattr(self, key)} must be above 0")

    @property
    def sentence(self) -> str:
        """What the figures of a plan owe to the run."""
        return (
            f"scaled by {self.time:.3g} (time) and {self.memory:.3g} (memory), measured in {self.run} "
            f"on {self.date}, {self.host}"
        )


def scaled(cost: Cost, factor: float) -> Cost:
    """Return `cost` with every part times `factor`."""
    return replace(cost, **{name: value * factor for name, value in parts(cost).items()})
