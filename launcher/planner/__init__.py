"""Which parallelism plan: legal plans, their predicted memory and time, the best one, and why."""

from launcher.planner.goals import Goal, achieve
from launcher.planner.search import PlanRequest, Problem, Ranking, rank

__all__ = ["Goal", "PlanRequest", "Problem", "Ranking", "achieve", "rank"]
