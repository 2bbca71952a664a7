"""Set the planner against well-known published runs: their time, their memory, and what it would choose instead.

    python -m benchmarks.reference_points [--configs ROWS.jsonl] [--record] [--write-docs]

ROWS.jsonl (the shared format) adds the best rows of the Megatron-Bridge table. For every point the published plan and
the planner's own are costed under the same model of the engine, Megatron-core with the kernels and state bytes of the
run. --write-docs writes docs/reference_points.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import strategies
from benchmarks import record
from benchmarks.published import Case, case_of
from benchmarks.reference_cases import Point, bridge_points, fixed_points
from launcher.planner.cost import GIB, Candidate, CostBreakdown, parts
from launcher.planner.price.calibrated import estimator_of
from launcher.planner.price.estimate import usable_bytes
from launcher.planner.problem import check_problem
from launcher.planner.search.order import TIE, ordered
from launcher.planner.search.sweep import sweep
from launcher.planner.space.plans import Space
from launcher.planner.words.tables import describe, differences, key_of, split_text
from strategies.base import Capabilities
from strategies.spec import Plan

STRATEGY = "megatron"
DOCUMENT = record.REPOSITORY / "docs" / "reference_points.md"
_BAR = 0.051  # SimuMax's mean over the eleven common cases
_LAYOUT = ("dp", "tp", "pp", "vp", "cp", "ep", "etp", "pipeline_split")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One point: the published plan as predicted, and the planner's own."""

    point: Point
    published_s: float
    plan: Plan
    cost: CostBreakdown  # of `plan`
    usable_gib: float
    missing: str | None  # what the search does not try by itself; None: the published plan is a candidate
    legal: bool  # the engine can run the published plan: with pins, it is a candidate
    chosen: Candidate | None  # None: nothing fits
    fastest_s: float | None  # of the plans that fit

    @property
    def error(self) -> float:
        """Relative error of the step time."""
        return self.cost.step_s / self.published_s - 1

    @property
    def memory_gib(self) -> float:
        """Predicted peak of the published plan."""
        return self.cost.memory.total / GIB

    @property
    def candidate(self) -> str:
        """Say whether the search weighs the published plan: by itself, with pins, or not at all."""
        if self.missing is None:
            return "yes"
        return f"pinned: {self.missing}" if self.legal else f"no: {self.missing}"

    @property
    def fits(self) -> bool:
        """Whether the published plan is predicted to fit."""
        return self.memory_gib <= self.usable_gib

    @property
    def chosen_s(self) -> float | None:
        """Predicted seconds of the planner's own choice."""
        return self.chosen.cost.step_s if self.chosen and self.chosen.cost else None

    @property
    def at_least_as_fast(self) -> bool:
        """Whether the fastest plan is no slower than the published one, and the choice no slower than a tie."""
        if self.chosen_s is None or self.fastest_s is None:
            return False
        published = self.cost.step_s * (1 + 1e-9)
        return self.fastest_s <= published and self.chosen_s <= published * TIE


def evaluate(point: Point) -> Outcome:
    """Cost the published plan and search for the planner's own, over the same model of the engine."""
    case = case_of(point.row)
    assert not isinstance(case, str) and case.measured_step_s, f"{point.name}: {case}"
    plan = replace(case.plan, strategy=STRATEGY, pipeline_split=point.pipeline_split)
    problem = case.problem(STRATEGY)
    check_problem(problem)
    space = Space(problem, strategy=STRATEGY, capabilities=capabilities_of(case))
    usable = usable_bytes(problem.cluster)
    fitting = ordered(sweep(problem, [space]).fitting, usable=usable)
    times = [candidate.cost.step_s for candidate in fitting if candidate.cost]
    return Outcome(
        point=point,
        published_s=case.measured_step_s,
        plan=plan,
        cost=estimator_of(problem, space.capabilities).predict(plan),
        usable_gib=usable / GIB,
        missing=missing(plan, space),
        legal=space.capabilities.why_not(plan) is None,
        chosen=fitting[0] if fitting else None,
        fastest_s=min(times, default=None),
    )


def capabilities_of(case: Case) -> Capabilities:
    """Return what Megatron-core can do, run as the published run was."""
    state = case.capabilities.state_bytes
    return replace(
        strategies.capabilities(STRATEGY),
        precisions=case.capabilities.precisions,
        state_bytes=state,
        buffer_elements=case.capabilities.buffer_elements,
        execution=case.capabilities.execution,
    )


def missing(plan: Plan, space: Space) -> str | None:
    """Return what `plan` says and the nearest plan of the search does not, or None where it is one of them."""
    nearest = min((differences(plan, other) for other in _alike(plan, space)), key=len, default=None)
    if nearest is None:
        return "no plan with its degrees"
    return (
        ", ".join(f"{key_of(field)}={_text(values[0])}" for field, values in nearest.items())
        if nearest
        else None
    )


def _alike(plan: Plan, space: Space) -> Iterator[Plan]:
    """Yield the plans of the search with the same layout and micro-batch."""
    for layout, batches in space.members:
        own = (*(getattr(layout, key) for key in _LAYOUT[:-1]), layout.split)
        if own == tuple(getattr(plan, key) for key in _LAYOUT):
            for batch in batches:
                if (batch.size, batch.count) == (plan.micro_batch_size, plan.num_microbatches):
                    yield from (space.plan(layout, batch, switches) for switches in space.switches(layout))


def _text(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---- figures and words ------------------------------------------------------------------------------------


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what a record holds."""
    common = [outcome for outcome in outcomes if outcome.point.common]
    return {
        "mean_error_common": {
            "ours": _mean(outcome.error for outcome in common),
            "simumax": _mean(outcome.point.simumax for outcome in common),
            "calculon": _mean(outcome.point.calculon for outcome in common),
            "bar": _BAR,
        },
        "mean_error_all": _mean(outcome.error for outcome in outcomes),
        "points": len(outcomes),
        "fit": sum(outcome.fits for outcome in outcomes),
        "candidates": sum(outcome.missing is None for outcome in outcomes),
        "candidates_if_pinned": sum(outcome.missing is None or outcome.legal for outcome in outcomes),
        "at_least_as_fast": sum(outcome.at_least_as_fast for outcome in outcomes),
        "by_point": [_row(outcome) for outcome in outcomes],
    }


def _row(outcome: Outcome) -> dict[str, Any]:
    point = outcome.point
    return {
        "id": point.row["id"],
        "name": point.name,
        "source": point.source,
        "assumed": point.assumed or None,
        "published_s": outcome.published_s,
        "predicted_s": outcome.cost.step_s,
        "error": outcome.error,
        "simumax": point.simumax,
        "calculon": point.calculon,
        "time": parts(outcome.cost.time),
        "memory_gib": outcome.memory_gib,
        "fits": outcome.fits,
        "candidate": outcome.candidate,
        "chosen": _words(outcome.chosen.plan) if outcome.chosen else None,
        "chosen_s": outcome.chosen_s,
        "fastest_s": outcome.fastest_s,
        "at_least_as_fast": outcome.at_least_as_fast,
    }


def _words(plan: Plan) -> str:
    """Write a plan as the words that pin it, runs of equal chunks as products."""
    words = describe(replace(plan, pipeline_split=())).removeprefix(f"{STRATEGY} ")
    return words + (f" pipeline_split={split_text(plan.pipeline_split)}" if plan.pipeline_split else "")


def _mean(errors: Iterable[float | None]) -> float | None:
    sizes = [abs(error) for error in errors if error is not None]
    return statistics.mean(sizes) if sizes else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f} %"


def time_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return the published times beside the predictions, header first, the means of the common cases last."""
    rows = [["run", "published s", "predicted s", "error", "SimuMax", "Calculon"]]
    for outcome in outcomes:
        point = outcome.point
        rows.append(
            [
                point.name,
                f"{outcome.published_s:.2f}",
                f"{outcome.cost.step_s:.2f}",
                *map(_percent, (outcome.error, point.simumax, point.calculon)),
            ]
        )
    means = figures_of(outcomes)["mean_error_common"]
    sizes = [f"{100 * means[name]:.1f} %" for name in ("ours", "simumax", "calculon")]
    return [*rows, ["**mean size of the error, the common cases**", "", "", *sizes]]


def plan_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return the published plans beside the planner's own, header first."""
    rows = [
        [
            "run",
            "published plan needs GiB",
            "fits",
            "candidate",
            "predicted s",
            "fastest s",
            "chosen s",
            "chosen plan",
        ]
    ]
    for outcome in outcomes:
        rows.append(
            [
                outcome.point.name,
                f"{outcome.memory_gib:.1f} of {outcome.usable_gib:.1f}",
                "yes" if outcome.fits else "no",
                outcome.candidate,
                f"{outcome.cost.step_s:.2f}",
                f"{outcome.fastest_s:.2f}" if outcome.fastest_s else "-",
                f"{outcome.chosen_s:.2f}" if outcome.chosen_s else "-",
                _words(outcome.chosen.plan) if outcome.chosen else "none fits",
            ]
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def document(outcomes: Sequence[Outcome]) -> str:
    """Return docs/reference_points.md."""
    figures = figures_of(outcomes)
    ours, bar = figures["mean_error_common"]["ours"], figures["mean_error_common"]["simumax"]
    sources = {outcome.point.name: _source(outcome.point) for outcome in outcomes}
    listed = "\n".join(f"- {name}: {source}" for name, source in sources.items())
    return f"""# Published reference points

Written by `python -m benchmarks.reference_points --write-docs`; do not edit.

Runs that papers and vendors have published, timed by this planner from their settings alone. The first
{sum(outcome.point.common for outcome in outcomes)} are those that two other analytical tools were run on: the mean
error is {100 * bar:.1f} % for SimuMax and {100 * ours:.1f} % here. The efficiencies of the GPUs were fitted to rows
that include some of these runs and their neighbours, so this is no test on unseen data; `benchmarks/fit_efficiency.py`
has one, over models left out. The peers ran as they are shipped, and Calculon's authors fitted it to the runs of
Korthikanti et al. What a source leaves open is assumed as the list at the end says.

## Step time

{markdown(time_table(outcomes))}

## The published plan and the planner's

Both are costed with the same kernels and bytes of state. Candidate: whether the search weighs the published plan by
itself, or with the pin that is named. The chosen plan may be up to 5 % slower than the fastest one, where it needs less
memory. {figures["at_least_as_fast"]} of {figures["points"]} times it is predicted at least as fast as the published
one, within that tie; {figures["fit"]} of the published plans are predicted to fit. Nobody has run the chosen plans.

{markdown(plan_table(outcomes))}

## Sources

{listed}
"""


def _source(point: Point) -> str:
    return point.source + (f". Assumed: {point.assumed}" if point.assumed else "")


def read_points(configs: Path | None) -> tuple[Point, ...]:
    """Return all points; those of the Megatron-Bridge table only with a file of rows."""
    if configs is None:
        return fixed_points()
    rows = (json.loads(line) for line in configs.read_text(encoding="utf-8").splitlines() if line.strip())
    return (*fixed_points(), *bridge_points(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the planner with well-known published runs.")
    parser.add_argument("--configs", type=Path, help="rows that hold the Megatron-Bridge table")
    parser.add_argument("--record", action="store_true", help="write a dated record")
    parser.add_argument("--write-docs", action="store_true", help="write docs/reference_points.md")
    arguments = parser.parse_args()
    outcomes = [evaluate(point) for point in read_points(arguments.configs)]
    print(markdown(time_table(outcomes)))
    print(markdown(plan_table(outcomes)))
    if arguments.write_docs:
        DOCUMENT.write_text(document(outcomes), encoding="utf-8")
    if arguments.record:
        named = ["--configs", arguments.configs.name] if arguments.configs else []
        made = record.create("reference_points", arguments=named, figures=figures_of(outcomes))
        print(record.write(made, name="reference_points"))


if __name__ == "__main__":
    main()
