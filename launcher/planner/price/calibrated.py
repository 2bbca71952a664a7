"""The estimator of a problem: the cost model as it is, or scaled to what a finished run measured."""

from __future__ import annotations

from dataclasses import replace

from launcher.planner.calibration import Calibration, scaled
from launcher.planner.cost import CostBreakdown
from launcher.planner.price.estimate import Bounds, Estimator, Footprint
from launcher.planner.problem import Problem
from strategies.base import Capabilities
from strategies.spec import Plan


def estimator_of(problem: Problem, capabilities: Capabilities) -> Estimator:
    """Return what costs the plans of `problem` under one engine."""
    if problem.calibration is None:
        return Estimator(problem, capabilities)
    return _Calibrated(problem, capabilities, problem.calibration)


class _Calibrated(Estimator):
    """Every answer in bytes or seconds is scaled alike, bounds too, so that a search stays exact."""

    def __init__(self, problem: Problem, capabilities: Capabilities, calibration: Calibration) -> None:
        super().__init__(problem, capabilities)
        self._calibration = calibration

    def footprint(self, plan: Plan) -> Footprint:
        return self._scaled(super().footprint(plan), self._calibration.memory)

    def cost(self, plan: Plan, footprint: Footprint) -> CostBreakdown:
        # The time model sees the bytes that it was made for.
        found = super().cost(plan, self._scaled(footprint, 1 / self._calibration.memory))
        return replace(
            found,
            memory=footprint.memory,
            host_bytes=footprint.host_bytes,
            time=scaled(found.time, self._calibration.time),
        )

    def state_bytes(self, plan: Plan) -> float:
        return super().state_bytes(plan) * self._calibration.memory

    def floor_s(self, plan: Plan) -> float:
        return super().floor_s(plan) * self._calibration.time

    def bounds(self, plan: Plan) -> Bounds:
        found, factor = super().bounds(plan), self._calibration.time
        return replace(found, busy_s=found.busy_s * factor, recompute_s=found.recompute_s * factor)

    def _scaled(self, footprint: Footprint, factor: float) -> Footprint:
        return replace(
            footprint,
            memory=scaled(footprint.memory, factor),
            host_bytes=footprint.host_bytes * factor,
        )
