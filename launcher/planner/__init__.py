"""Which parallelism plan: legal plans, their predicted memory and time, the best one, and why."""

from launcher.planner.search.goals import Goal, achieve
from launcher.planner.search.ranking import PlanRequest, Problem, Ranking, rank

__all__ = ["Goal", "PlanRequest", "Problem", "Ranking", "achieve", "rank"]
