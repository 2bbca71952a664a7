"""The best plan of every engine side by side, whichever the job asks for, and why one of them wins. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import strategies as adapters
from launcher.decode import encode
from launcher.errors import PlanError
from launcher.planner.cost import Candidate
from launcher.planner.price.estimate import usable_bytes
from launcher.planner.search.order import TIE, ordered, step_s
from launcher.planner.search.ranking import Ranking, solve
from launcher.planner.words import why
from launcher.planner.words.explain import cost_of, predictions
from launcher.planner.words.tables import describe, gib_text, grid, seconds_text

HEADER = ("engine", "s/step", "tokens/s/GPU", "GiB", "installed here", "plan")
WORDS = (0, 4, 5)  # columns that are not figures


@dataclass(frozen=True, kw_only=True)
class EngineBest:
    """The best plan of one engine, and one sentence: why another engine's wins, or why it has none."""

    strategy: str
    candidate: Candidate | None
    reason: str = ""  # empty for the winner


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Every engine's best plan, the winner first, then as they rank, then those without one."""

    ranking: Ranking  # of the job
    entries: tuple[EngineBest, ...]

    @property
    def verdict(self) -> str:
        """Say how the job's choice stands to the winner."""
        chosen, winner = self.ranking.choose().plan.strategy, self.entries[0].strategy
        if chosen == winner:
            return f"{chosen} is chosen"
        asked = " or ".join(self.ranking.problem.strategies)
        return f"{chosen} is chosen because the job asks for {asked}; strategy={winner} is predicted to do better"


def contest(ranking: Ranking) -> Contest:
    """Plan for the engines that the job left out, too; raise PlanError where the job itself has no plan."""
    chosen = ranking.choose()
    names = sorted({*adapters.engines(), chosen.plan.strategy})
    found = {name: _plans_of(ranking, name) for name in names}
    together = replace(
        ranking,
        problem=replace(ranking.problem, strategies=tuple(names)),
        candidates=tuple(
            ordered(
                (candidate for plans, _ in found.values() for candidate in plans),
                usable=usable_bytes(ranking.problem.cluster),
            )
        ),
    )
    bests = {name: plans[0] for name, (plans, _) in found.items() if plans} | {chosen.plan.strategy: chosen}
    winner = together.choose().plan.strategy
    behind = sorted(bests.keys() - {winner}, key=lambda name: (step_s(bests[name]), name))
    entries = [EngineBest(strategy=winner, candidate=bests[winner])]
    for name in behind:
        verdict, reason = why.compared(together, bests[winner], bests[name], called=winner)
        words = f"slower than {winner} {reason}" if verdict == why.SLOWER else reason
        entries.append(EngineBest(strategy=name, candidate=bests[name], reason=words))
    entries += [
        EngineBest(strategy=name, candidate=None, reason=found[name][1])
        for name in names
        if name not in bests
    ]
    return Contest(ranking=ranking, entries=tuple(entries))


def to_json(found: Contest, *, absent: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the entries as plain data; `absent` has the command that installs each engine that is not here."""
    return [
        {
            "strategy": entry.strategy,
            "plan": encode(entry.candidate.plan) if entry.candidate else None,
            "predictions": predictions(entry.candidate, found.ranking) if entry.candidate else None,
            "reason": entry.reason,
            "is_here": entry.strategy not in absent,
            "install": absent.get(entry.strategy),
            "is_chosen": entry.strategy == found.ranking.choose().plan.strategy,
        }
        for entry in found.entries
    ]


def to_text(found: Contest, *, absent: Mapping[str, str]) -> str:
    """Write one row an engine, and a sentence for each but the winner."""
    table = grid([HEADER, *cells(found, absent=absent)], words=WORDS)
    return "\n".join([f"every engine's best plan ({found.verdict}):", table, *sentences(found)])


def cells(found: Contest, *, absent: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return one row an engine, the winner first."""
    return [_row(entry, install=absent.get(entry.strategy)) for entry in found.entries]


def sentences(found: Contest) -> list[str]:
    """Say of each engine behind the winner why."""
    return [f"{entry.strategy}: {entry.reason}" for entry in found.entries if entry.reason]


def _row(entry: EngineBest, *, install: str | None) -> tuple[str, ...]:
    here = f"no: {install}" if install else "yes"
    if entry.candidate is None:
        return (entry.strategy, "-", "-", "-", here, "none")
    cost = cost_of(entry.candidate)
    figures = (seconds_text(cost.step_s), f"{cost.tokens_per_s_per_gpu:.0f}", gib_text(cost.memory.total))
    return (entry.strategy, *figures, here, _words(entry.candidate))


def _plans_of(ranking: Ranking, name: str) -> tuple[Sequence[Candidate], str]:
    """Return the plans of one engine, best first, and why there are none.

    Those of a ranking that weighed the engine are all that count where none tied with its fastest was left out.
    """
    problem = ranking.problem
    own = [candidate for candidate in ranking.candidates if candidate.plan.strategy == name]
    limit_s = math.inf if ranking.limit_s is None else ranking.limit_s
    if own and min(map(step_s, own)) * TIE <= limit_s:
        return ordered(own, usable=usable_bytes(problem.cluster)), ""
    # The keys passed through are those of the engine that the job named.
    engine = problem.engine if problem.strategies == (name,) else {}
    try:
        alone = solve(replace(problem, strategies=(name,), engine=engine), only_best=True)
    except PlanError as error:
        return (), str(error)
    return alone.candidates, "" if alone.candidates else _too_large(alone.nearest_miss())


def _too_large(nearest: Candidate) -> str:
    return f"no plan fits; the nearest, {_words(nearest)}, {nearest.rejected}"


def _words(candidate: Candidate) -> str:
    return describe(candidate.plan).removeprefix(f"{candidate.plan.strategy} ")
