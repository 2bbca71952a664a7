"""Which of the plan's groups a collective in a trace belongs to, in the plan's own words: tp, cp, dp, ep, pp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from strategies.spec import BESIDE, Plan

NAME = "Process Group Name"  # as events call it that know theirs
ASIDE = "aside"  # of a rank alone, which sends nothing, or of what works beside the training
_MESSAGES = ("gloo:send", "gloo:recv")
_PIPELINE = "pp"


def named(configs: Iterable[Mapping[str, Any]], plan: Plan) -> dict[str, str]:
    """Return what to call each process group: the degrees in which its ranks differ, joined.

    `configs` are the process groups of this rank, as a trace lists them under `distributedInfo`.
    """
    found = {_PIPELINE: _PIPELINE}
    for config in configs:
        ranks, described = config.get("ranks", ()), str(config.get("pg_desc", ""))
        aside = len(ranks) == 1 or described == BESIDE
        if name := ASIDE if aside else _degrees(ranks, plan, described=described):
            found[str(config["pg_name"])] = name
    return found


def _degrees(ranks: Sequence[int], plan: Plan, *, described: str) -> str:
    differing = [axis for axis in plan.rank_order if len({plan.coordinate(axis, r) for r in ranks}) > 1]
    if "dp" in differing and plan.ep > 1:
        # Experts live on ranks of dp (and cp): on neighbours. Where they take all of dp only the engine can tell.
        places = {plan.coordinate("dp", rank) for rank in ranks}
        neighbours = max(places) - min(places) + 1 == len(places) < plan.dp
        if neighbours or ("EXPERT" in described and "DATA" not in described):
            return "ep"
    return "-".join(differing)


def attributed(
    events: Sequence[Mapping[str, Any]], collectives: Sequence[tuple[str, str]], plan: Plan
) -> list[Mapping[str, Any]]:
    """Return the events of a trace, those of gloo with the process group that PyTorch's profiler does not learn.

    `collectives` are what gloo was asked for meanwhile, in order: the name of the event, the name of the group. Events
    of one name begin in that order, unless one group overtakes another; but each of gloo's threads works for one
    group, and so for the one that most of its events were matched with. Messages from rank to rank are not among
    them: they are the pipeline's, where no context parallelism sends any.
    """
    asked: dict[str, list[str]] = {}
    for name, group in collectives:
        asked.setdefault(name, []).append(group)
    votes: dict[Any, Counter[str]] = {}
    for name, groups in asked.items():
        begun = sorted((e for e in events if e.get("name") == name), key=lambda event: float(event["ts"]))
        # What was asked for last may not have begun; what was asked for first may be forgotten.
        for event, group in zip(begun[-len(groups) :], groups, strict=False):
            votes.setdefault(event["tid"], Counter())[group] += 1
    served = {thread: counted.most_common(1)[0][0] for thread, counted in votes.items()}
    messages = _MESSAGES if plan.pp > 1 and plan.cp == 1 else ()

    def group_of(event: Mapping[str, Any]) -> str | None:
        if event.get("name") in messages:
            return _PIPELINE
        return served.get(event["tid"]) if event.get("name") in asked else None

    found = ((event, group_of(event)) for event in events)
    return [
        event if group is None else {**event, "args": {**event.get("args", {}), NAME: group}}
        for event, group in found
    ]
