"""Which parallelism plan: legal plans, their predicted memory and time, the best one, and why."""

from launcher.planner.search import PlanRequest, Ranking, rank

__all__ = ["PlanRequest", "Ranking", "rank"]
