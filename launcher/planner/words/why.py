"""Why not another plan: `--why tp=4,pp=2` ranks again under these pins and compares with the choice. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

import strategies as adapters
from launcher.decode import decode, encode
from launcher.errors import ConfigError, PlanError
from launcher.planner.cost import Candidate, MemoryCost, TimeCost, parts
from launcher.planner.problem import PlanRequest, Problem, text_of
from launcher.planner.search.order import COMFORTABLE, MATERIAL, TIE, memory_bytes, step_s
from launcher.planner.search.ranking import Ranking, solve, usable_bytes
from launcher.planner.words.explain import cost_of, predictions
from launcher.planner.words.tables import (
    describe,
    differences,
    gib_text,
    grid,
    key_of,
    percent_text,
    seconds_text,
)
from strategies.names import suggest

CHOSEN, ILLEGAL, TOO_LARGE, SLOWER, NOT_SLOWER = (
    "chosen",
    "not possible",
    "does not fit",
    "slower",
    "not slower",
)
_MOST_PARTS = 3  # named in a sentence; the table has all


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Why the plan asked for is not the choice. `candidate` is the best such plan, or the one nearest to fitting."""

    pins: Mapping[str, Any]  # fields of a plan
    verdict: str
    reason: str
    candidate: Candidate | None = None


def parse(question: str) -> dict[str, Any]:
    """Read `tp=4,plan.pp=2,strategy=deepspeed`; raise ConfigError for what cannot be meant."""
    pins: dict[str, Any] = {}
    for word in _words(question):
        name, equals, text = word.partition("=")
        key = name.strip().removeprefix("plan.")
        if not equals:
            raise ConfigError(f"--why '{question}' does not say key=value; write --why tp=4,pp=2")
        known = [field.name for field in fields(PlanRequest)]
        if key not in ("strategy", *known):
            raise ConfigError(
                f"--why {word}: '{key}' is no key of a plan; {suggest(key, ['strategy', *known])}"
            )
        if key in pins:
            raise ConfigError(f"--why '{question}' names {key} twice; ask one thing at a time")
        pins[key] = _value(word, key, text)
    return pins


def answer(ranking: Ranking, pins: Mapping[str, Any]) -> Answer:
    """Compare the choice with the best plan under `pins`; raise PlanError where nothing was chosen."""
    best, problem = ranking.choose(), ranking.problem
    if all(getattr(best.plan, key) == value for key, value in pins.items()):
        return Answer(pins=pins, verdict=CHOSEN, reason="that is the chosen plan", candidate=best)
    try:
        asked = solve(pinned(problem, pins))
    except (PlanError, ValueError) as error:
        return Answer(pins=pins, verdict=ILLEGAL, reason=str(error))
    if not asked.candidates:
        return _too_large(asked, pins)
    other = asked.choose()
    verdict, reason = compared(ranking, best, other, pins=pins)
    return Answer(pins=pins, verdict=verdict, reason=reason, candidate=other)


def compared(
    ranking: Ranking,
    best: Candidate,
    other: Candidate,
    *,
    pins: Mapping[str, Any] | None = None,
    called: str = "the chosen plan",
) -> tuple[str, str]:
    """Say how a plan that fits does against the best one of a ranking, which is `called` so; one sentence."""
    if cost_of(other).step_s > cost_of(best).step_s:
        return SLOWER, _slower(best, other)
    but = _but(ranking, best, other, pins or {}) or _tie(ranking, best, other, called)
    return NOT_SLOWER, f"{_faster(best, other, called)}, but {but}"


def pinned(problem: Problem, pins: Mapping[str, Any]) -> Problem:
    """Return the problem with further pins, which replace those of the job."""
    wanted = dict(pins)
    strategy = wanted.pop("strategy", None)
    problem = replace(problem, request=replace(problem.request, **wanted))
    if strategy is None or problem.strategies == (strategy,):
        return problem
    # The keys passed through are those of the engine that the job named.
    return replace(problem, strategies=(strategy,), engine={})


def to_json(found: Answer, ranking: Ranking) -> dict[str, Any]:
    """Return the answer as plain data, differences as asked minus chosen."""
    data: dict[str, Any] = {
        "question": {key_of(name): encode(value) for name, value in found.pins.items()},
        "verdict": found.verdict,
        "reason": found.reason,
        "plan": None,
        "predictions": None,
        "difference": None,
    }
    if found.candidate is not None:
        best, other = cost_of(ranking.choose()), cost_of(found.candidate)
        data["plan"] = encode(found.candidate.plan)
        data["predictions"] = predictions(found.candidate, ranking)
        data["difference"] = {
            "step_s": other.step_s - best.step_s,
            "step_s_by_part": _changes(best.time, other.time),
            "memory_bytes": other.memory.total - best.memory.total,
            "memory_bytes_by_part": _changes(best.memory, other.memory),
        }
    return data


def to_text(found: Answer, ranking: Ranking) -> str:
    """Write the question, the answer in one sentence, and the figures of both plans."""
    asked = ", ".join(f"{key_of(name)}={text_of(value)}" for name, value in found.pins.items())
    lines = [f"why not {asked}?", f"  {found.verdict}: {found.reason}"]
    if found.candidate is None or found.verdict == CHOSEN:
        return "\n".join(lines)
    nearest = "the nearest such plan" if found.verdict == TOO_LARGE else "the best such plan"
    lines += [f"  {nearest}: {describe(found.candidate.plan)}", "", _comparison(found, ranking)]
    return "\n".join(lines)


# ---- the question -------------------------------------------------------------------------------------------------


def _words(question: str) -> list[str]:
    """Split at commas outside of brackets."""
    words, depth = [""], 0
    for letter in question:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return words


def _value(word: str, key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--why {word}: the value cannot be read; write --why tp=4,pp=2") from error
    if value is None:
        raise ConfigError(f"--why {word} asks for no value in particular; give one, as in --why tp=4")
    try:
        if key == "strategy":
            adapters.capabilities(str(value))
            return str(value)
        return getattr(decode(PlanRequest, {key: value}, "plan"), key)
    except ValueError as error:
        raise ConfigError(f"--why {word}: {error}") from error


# ---- the answer ---------------------------------------------------------------------------------------------------


def _too_large(asked: Ranking, pins: Mapping[str, Any]) -> Answer:
    """Take the nearest miss, and the remedy from the error that training with these pins would give."""
    try:
        asked.choose()
    except PlanError as error:
        reason = str(error)
    return Answer(pins=pins, verdict=TOO_LARGE, reason=reason, candidate=asked.nearest_miss())


def _slower(best: Candidate, other: Candidate) -> str:
    chosen_s, asked_s = cost_of(best).step_s, cost_of(other).step_s
    words = _most_changed(_changes(cost_of(best).time, cost_of(other).time), lambda s: f"{seconds_text(s)} s")
    return f"by {seconds_text(asked_s - chosen_s)} s a step ({percent_text(asked_s / chosen_s - 1)}): {words}"


def _most_changed(changes: Mapping[str, float], text: Callable[[float], str]) -> str:
    """Name the parts that grow most."""
    worst = sorted(changes.items(), key=lambda item: -item[1])[:_MOST_PARTS]
    return ", ".join(f"{name} +{text(value)}" for name, value in worst if value > 0.1 * worst[0][1])


def _faster(best: Candidate, other: Candidate, called: str) -> str:
    saved = cost_of(best).step_s - cost_of(other).step_s
    if saved == 0:
        return f"as fast as {called}"
    return f"faster by {seconds_text(saved)} s a step ({percent_text(saved / cost_of(best).step_s)})"


def _but(ranking: Ranking, best: Candidate, other: Candidate, pins: Mapping[str, Any]) -> str | None:
    """Say why a plan that is not slower was not weighed at all; None where it was."""
    problem = ranking.problem
    against = [
        f"plan.{key}={text_of(getattr(problem.request, key))}"
        for key, value in pins.items()
        if key != "strategy" and getattr(problem.request, key) not in (None, value)
    ]
    if other.plan.strategy not in problem.strategies:
        against.append(f"strategy={' or '.join(problem.strategies)}")
    if against:
        return f"the job asks for {' and '.join(against)}"
    offloads = other.plan.offload_optimizer or other.plan.offload_parameters
    if offloads and not (best.plan.offload_optimizer or best.plan.offload_parameters):
        return "offloading is weighed only where nothing fits without it, or where it is pinned"
    fastest_s = min(map(step_s, ranking.candidates))
    return "the search weighs such a plan only where it is pinned" if step_s(other) < fastest_s else None


def _tie(ranking: Ranking, best: Candidate, other: Candidate, called: str) -> str:
    """Say which rule of order.py decided between plans that count as equally fast."""
    return (
        f"the prediction cannot tell plans within {percent_text(TIE - 1)} of the fastest apart, and "
        f"{_rule(ranking, best, other, called)}"
    )


def _rule(ranking: Ranking, best: Candidate, other: Candidate, called: str) -> str:
    usable = usable_bytes(ranking.problem.cluster)
    limit_s = min(map(step_s, ranking.candidates)) * TIE
    tied = [candidate for candidate in ranking.candidates if step_s(candidate) <= limit_s]
    lightest = min(tied, key=memory_bytes)
    chosen, asked = memory_bytes(best), memory_bytes(other)
    if asked > memory_bytes(lightest) + MATERIAL * usable:
        more = _changes(cost_of(lightest).memory, cost_of(other).memory)
        return (
            f"of these it needs {gib_text(asked - memory_bytes(lightest))} GiB more per GPU than the lightest: "
            f"{_most_changed(more, lambda b: f'{gib_text(b)} GiB')}"
        )
    if asked > COMFORTABLE * usable >= chosen:
        free = f"{gib_text(usable - chosen)} GiB, not {gib_text(usable - asked)}"
        return f"{called} leaves more of the memory free: {free}"
    words = [
        f"{key_of(key)}={text_of(one)} instead of {text_of(two)}"
        for key, (one, two) in differences(best.plan, other.plan).items()
    ]
    return f"{called} counts as simpler: {', '.join(words)}"


# ---- tables -------------------------------------------------------------------------------------------------------


def _changes(chosen: MemoryCost | TimeCost, asked: MemoryCost | TimeCost) -> dict[str, float]:
    before = parts(chosen)
    return {name: value - before[name] for name, value in parts(asked).items()}


def _comparison(found: Answer, ranking: Ranking) -> str:
    """Put the chosen plan and the one asked for side by side."""
    assert found.candidate is not None, "only a costed plan is compared"
    best, other = cost_of(ranking.choose()), cost_of(found.candidate)
    usable = usable_bytes(ranking.problem.cluster)
    rows: list[tuple[str, ...]] = [("memory of the fullest rank, GiB", "chosen", "asked", "difference")]
    rows += _compared(parts(best.memory), parts(other.memory), gib_text)
    rows += [("  usable", gib_text(usable), gib_text(usable), "")]
    if best.host_bytes or other.host_bytes:
        rows += [_line("on the host", best.host_bytes, other.host_bytes, gib_text)]
    rows += [("one step, s", "", "", "")]
    rows += _compared(parts(best.time), parts(other.time), seconds_text)
    return grid(rows)


def _compared(
    chosen: Mapping[str, float], asked: Mapping[str, float], text: Callable[[float], str]
) -> list[tuple[str, ...]]:
    rows = [_line(name, chosen[name], asked[name], text) for name in chosen if chosen[name] or asked[name]]
    return [*rows, _line("total", sum(chosen.values()), sum(asked.values()), text)]


def _line(name: str, chosen: float, asked: float, text: Callable[[float], str]) -> tuple[str, ...]:
    change = asked - chosen
    return (f"  {name}", text(chosen), text(asked), f"{'+' if change > 0 else ''}{text(change)}")
