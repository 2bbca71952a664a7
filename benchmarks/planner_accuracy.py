"""Compare predictions with published runs: step time, peak memory, what fits, and which plan is best.

    python -m benchmarks.planner_accuracy --configs ROWS.jsonl [--json OUT] [--record]

ROWS.jsonl holds one measured configuration a line in the shared format. OUT is {"rows": [...], "summary": {...}} with
one object for every input row; a row without a prediction says why. For step time the summary counts only rows whose
input is known in full (`usable.full_step_time_target`); for the ranking it groups rows that differ in the plan only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.published import FAULTS, Case, case_of
from benchmarks.published_memory import memory_kind, predicted_memory_gib
from launcher.planner.cost import CostBreakdown
from launcher.planner.price.compute import peak_flops
from launcher.planner.price.estimate import Estimator, usable_bytes

_SMALLEST_GROUP = 4  # plans, below which a rank correlation says nothing
_BASELINE_SHARE = 0.45  # of the peak: the one-line formula


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One input row and what is predicted for it."""

    row: Mapping[str, Any]
    case: Case | None
    reason: str | None  # why there is no prediction
    cost: CostBreakdown | None
    fits: bool | None

    @property
    def step_error(self) -> float | None:
        """Relative error of the step time, where both figures exist."""
        if self.case is None or self.cost is None or not self.case.measured_step_s:
            return None
        return self.cost.step_s / self.case.measured_step_s - 1

    @property
    def memory_gib(self) -> float | None:
        """Predicted peak, of the kind that the row prints."""
        if self.case is None or self.cost is None:
            return None
        return predicted_memory_gib(self.cost.memory, self.case.cluster, memory_kind(self.row))

    @property
    def memory_error(self) -> float | None:
        """Relative error of the peak memory, where both figures exist."""
        if self.memory_gib is None or self.case is None or not self.case.measured_memory_gib:
            return None
        return self.memory_gib / self.case.measured_memory_gib - 1


def evaluate_line(line: str) -> Evaluated:
    """Predict the row that one line holds; one that holds none says so."""
    try:
        return evaluate(json.loads(line))
    except json.JSONDecodeError as error:
        return _without({}, f"the line is not JSON: {error}")


def evaluate(row: Any) -> Evaluated:
    """Predict one row; never raises for what a row lacks."""
    case = case_of(row)
    if isinstance(case, str):
        return _without(row if isinstance(row, Mapping) else {}, case)
    estimator = Estimator(case.problem(case.plan.strategy), case.capabilities)
    try:
        cost = estimator.predict(case.plan)
    except FAULTS as error:
        return _without(row, f"the row cannot be planned: {type(error).__name__}: {error}")
    fits = cost.memory.total <= usable_bytes(case.cluster)
    return Evaluated(row=row, case=case, reason=None, cost=cost, fits=fits)


def _without(row: Mapping[str, Any], reason: str) -> Evaluated:
    return Evaluated(row=row, case=None, reason=reason, cost=None, fits=None)


def to_row(found: Evaluated) -> dict[str, Any]:
    """Return the object that OUT holds for one row."""
    return {
        "id": found.row.get("id"),
        "predicted_step_time_s": found.cost.step_s if found.cost else None,
        "predicted_memory_gib": found.memory_gib,
        "fits": found.fits,
        "reason": found.reason,
        "measured_step_time_s": found.case.measured_step_s if found.case else None,
        "step_time_error": found.step_error,
        "measured_memory_gib": found.case.measured_memory_gib if found.case else None,
        "memory_error": found.memory_error,
    }


def summary_of(rows: Sequence[Evaluated]) -> dict[str, Any]:
    """Return the figures over all rows."""
    full = [found for found in rows if _usable(found, "full_step_time_target")]
    timed = [found for found in full if found.step_error is not None]
    ran = [found for found in rows if not found.row.get("oom") and found.fits is not None]
    return {
        "rows": len(rows),
        "predicted": sum(found.cost is not None for found in rows),
        "not_predicted": _reasons(found.reason for found in rows if found.reason),
        "step_time": {
            "targets": len(full),
            "coverage": len(timed) / len(full) if full else None,
            "all": _errors([found.step_error for found in timed]),
            **{
                name: _by(timed, key, lambda found: found.step_error)
                for name, key in (
                    ("by_source", _source),
                    ("by_gpu", lambda found: str(found.row.get("gpu"))),
                    ("by_framework", lambda found: str(found.row.get("framework"))),
                    ("by_precision", lambda found: str(found.row.get("precision"))),
                    ("by_kind", lambda found: "moe" if found.row["model"].get("moe") else "dense"),
                )
            },
        },
        "memory": _memory(rows),
        "feasibility": {
            "ran": len(ran),
            "ran_and_predicted_to_fit": sum(bool(found.fits) for found in ran) / len(ran) if ran else None,
            "by_source": _feasibility(rows),
        },
        "ranking": ranking_of(rows),
    }


def _source(found: Evaluated) -> str:
    assert found.case, "only rows with a prediction are grouped by source"
    return found.case.source


def _usable(found: Evaluated, question: str) -> bool:
    """Say whether a row is marked as fit for a question."""
    usable = found.row.get("usable")
    return isinstance(usable, Mapping) and bool(usable.get(question))


def _memory(rows: Sequence[Evaluated]) -> dict[str, Any]:
    known = [
        found
        for found in rows
        if found.memory_error is not None
        and _usable(found, "shape_known")
        and _usable(found, "config_complete")
    ]
    return {
        "all": _errors([found.memory_error for found in known]),
        "by_source": _by(known, _source, lambda found: found.memory_error),
    }


def _errors(errors: Sequence[float | None]) -> dict[str, float] | None:
    """Return count, median and 90th percentile of the sizes, and the median with its sign."""
    known = [error for error in errors if error is not None]
    if not known:
        return None
    sizes = sorted(map(abs, known))
    return {
        "n": len(known),
        "median": statistics.median(sizes),
        "p90": sizes[round(0.9 * (len(sizes) - 1))],
        "bias": statistics.median(known),
    }


def _by(
    rows: Sequence[Evaluated], key: Callable[[Evaluated], str], value: Callable[[Evaluated], float | None]
) -> dict[str, Any]:
    groups: dict[str, list[float | None]] = defaultdict(list)
    for found in rows:
        groups[key(found)].append(value(found))
    return {name: _errors(errors) for name, errors in sorted(groups.items())}


def _reasons(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())


def _feasibility(rows: Sequence[Evaluated]) -> dict[str, Any]:
    """Return, for each source with both kinds of rows, how well the two are told apart."""
    groups: dict[str, list[Evaluated]] = defaultdict(list)
    for found in rows:
        if found.fits is not None:
            groups[_source(found)].append(found)
    result = {}
    for source, members in sorted(groups.items()):
        ran = [bool(found.fits) for found in members if not found.row.get("oom")]
        failed = [not found.fits for found in members if found.row.get("oom")]
        if ran and failed:
            shares = (sum(ran) / len(ran), sum(failed) / len(failed))
            result[source] = {
                "ran": len(ran),
                "out_of_memory": len(failed),
                "ran_and_fits": shares[0],
                "out_of_memory_and_too_large": shares[1],
                "balanced_accuracy": statistics.mean(shares),
            }
    return result


def ranking_of(rows: Sequence[Evaluated]) -> dict[str, Any]:
    """Compare the order of plans in every group of rows that differ in the plan only."""
    groups: dict[tuple[Any, ...], list[Evaluated]] = defaultdict(list)
    for found in rows:
        if found.step_error is not None:
            groups[_group_key(found)].append(found)
    by_plan = map(_by_plan, groups.values())
    compared = [_compare(plans) for plans in by_plan if len(plans) >= _SMALLEST_GROUP]
    return {
        "groups": len(compared),
        "ours": _ranked([group["ours"] for group in compared]),
        "baseline": _ranked([group["baseline"] for group in compared]),
        "by_group": compared,
    }


def _group_key(found: Evaluated) -> tuple[Any, ...]:
    """Return everything but the plan: source and release, model, GPUs, batch, precision, kernels, task."""
    row = found.row
    assert found.case, "only rows with a prediction are ranked"
    model = tuple(row["model"].get(key) for key in ("name", "layers", "hidden", "heads", "vocab"))
    machine = (row["gpu"], row["num_gpus"], row.get("framework"), row.get("version"))
    work = (row["gbs"], row["model"]["seq_len"], row.get("precision"), row.get("task"))
    return (_source(found), repr((model, machine, work)), found.case.capabilities.execution)


def _by_plan(members: Sequence[Evaluated]) -> list[tuple[Evaluated, float]]:
    """Return one member a plan with the median of what was measured under it."""
    plans: dict[str, list[Evaluated]] = defaultdict(list)
    for found in members:
        assert found.case, "only rows with a prediction are ranked"
        plans[repr(found.case.plan)].append(found)
    return [(same[0], statistics.median(map(_measured, same))) for same in plans.values()]


def _compare(plans: Sequence[tuple[Evaluated, float]]) -> dict[str, Any]:
    measured = [seconds for _, seconds in plans]
    ours = [found.cost.step_s for found, _ in plans if found.cost]
    baseline = [_baseline_s(found) for found, _ in plans]
    case = plans[0][0].case
    assert case, "only rows with a prediction are ranked"
    return {
        "source": case.source,
        "model": case.model.name,
        "gpus": case.plan.world_size,
        "plans": len(plans),
        "ours": {"tau": kendall(ours, measured), "regret": regret(ours, measured)},
        "baseline": {"tau": kendall(baseline, measured), "regret": regret(baseline, measured)},
    }


def _measured(found: Evaluated) -> float:
    assert found.case and found.case.measured_step_s, "only timed rows are ranked"
    return found.case.measured_step_s


def _baseline_s(found: Evaluated) -> float:
    """The one-line formula: FLOPs at one flat share of the peak, times the bubble of 1F1B."""
    assert found.case and found.cost, "only timed rows are ranked"
    plan = found.case.plan
    recompute = {"none": 1.0, "selective": 1.0, "full": 4 / 3}[plan.recompute]
    rate = peak_flops(found.case.cluster.gpu, plan.precision) * _BASELINE_SHARE * plan.world_size
    bubble = (plan.num_microbatches + plan.pp - 1) / plan.num_microbatches
    return found.cost.model_flops_per_step * recompute / rate * bubble


def kendall(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return Kendall's tau-b between two orders; equal predictions count half as much as right ones."""
    agree = ties_predicted = ties_measured = 0
    pairs = list(combinations(range(len(measured)), 2))
    for one, other in pairs:
        first, second = predicted[one] - predicted[other], measured[one] - measured[other]
        ties_predicted += first == 0
        ties_measured += second == 0
        agree += (first * second > 0) - (first * second < 0)
    sizes = (len(pairs) - ties_predicted) * (len(pairs) - ties_measured)
    return agree / sizes**0.5 if sizes else 0.0


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return how much slower than the best the plan really is that is predicted to be fastest (the worst of equals)."""
    least = min(predicted)
    chosen = max(real for guess, real in zip(predicted, measured, strict=True) if guess == least)
    return chosen / min(measured) - 1


def _ranked(groups: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    if not groups:
        return None
    regrets = sorted(group["regret"] for group in groups)
    return {
        "mean_tau": statistics.mean(group["tau"] for group in groups),
        "median_regret": statistics.median(regrets),
        "p90_regret": regrets[round(0.9 * (len(regrets) - 1))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare predictions with published runs.")
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--record", action="store_true", help="write a dated record of the summary")
    arguments = parser.parse_args()
    rows = [evaluate_line(line) for line in arguments.configs.read_text().splitlines() if line.strip()]
    summary = summary_of(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [to_row(found) for found in rows], "summary": summary}))
    if arguments.record:
        made = record.create(
            "planner_accuracy", arguments=["--configs", arguments.configs.name], figures=summary
        )
        print(record.write(made, name="planner_accuracy"))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
