"""Fit hydra_configs/efficiency/*.yaml to published step times, and say how well models left out are predicted.

    python -m benchmarks.fit_efficiency --configs ROWS.jsonl [--folds 24] [--write] [--record]

Parameters are fitted together on a logarithmic scale by Gauss-Newton steps: the residual of a row is the logarithm of
predicted over measured step time, bounded in its influence (Huber) and weighted so that large sources do not drown
small ones; a prior keeps each parameter near a plausible value unless the rows say otherwise. Cross-validation leaves
whole models out, so that a figure never rests on another row of the same model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import record
from benchmarks.published import Case, case_of
from launcher.cluster.efficiency import Efficiency
from launcher.planner.cost import MemoryCost
from launcher.planner.price.estimate import Estimator
from launcher.planner.price.stages import StageShape
from launcher.planner.price.step_time import StepTimer

FOLDER = Path(__file__).parent.parent / "hydra_configs" / "efficiency"
# GPU kinds by the words of their names, and the architecture whose parameters they share.
KINDS = {
    "v100": ("V100",),
    "a100": ("A100", "A10G", "L40S"),
    "h100_96gb": ("H100-96GB",),
    "h100": ("H100", "H200"),
    "gb300": ("GB300",),
    "gb200": ("GB200",),
    "b300": ("B300",),
    "b200": ("B200",),
    "mi300x": ("MI3",),
}
FAMILIES = {
    "v100": "volta",
    "a100": "ampere",
    "h100_96gb": "hopper",
    "h100": "hopper",
    "gb300": "blackwell",
    "gb200": "blackwell",
    "b300": "blackwell",
    "b200": "blackwell",
    "mi300x": "cdna3",
}
# Parameter: prior (None: what the file says), and how far a factor of it is plausible (one sigma, log scale).
SHARED = {
    "matmul_half_size": (64.0, 0.5),
    "matmul_us": (5.0, 0.3),
    "misaligned_matmul": (0.8, 0.2),
    "grouped_matmul": (0.9, 0.15),
    "grouped_narrow": (0.7, 0.2),
    "attention_half_tiles": (60.0, 0.5),
    "skew_us": (25.0, 0.5),
    "attention_backward": (0.8, 0.15),
    "ring_attention": (0.85, 0.07),
    "unfused_norm": (20.0, 0.3),
    "kernel_us": (5.0, 0.3),
    "overlap": (0.85, 0.1),
    "interference": (0.15, 0.3),
    "tp_overlap": (0.5, 0.3),
    "step_ms": (10.0, 0.3),
}
# Priors by architecture: matrix products as SimuMax measured them (A100, B200) and as the largest that ml-engineering
# found allow (H100), attention as the FlashAttention papers print it, over the FLOPs under the causal mask.
_SIGMA = {"matmul": 0.08, "attention": 0.08, "memory": 0.06, "moe_stall_ms": 0.2}
_COLUMNS = (
    "matmul.bf16", "matmul.fp8", "matmul.nvfp4",
    "attention.flash3", "attention.flash", "attention.flash1", "attention.unfused", "memory", "moe_stall_ms",
)  # fmt: skip
_PRIORS = {
    "volta": (0.65, 0.6, 0.5, 0.5, 0.45, 0.35, 0.5, 0.82, 3.0),
    "ampere": (0.74, 0.6, 0.5, 0.5, 0.45, 0.40, 0.4, 0.85, 3.0),
    "hopper": (0.66, 0.64, 0.5, 0.62, 0.36, 0.22, 0.3, 0.75, 4.0),
    "blackwell": (0.52, 0.58, 0.44, 0.5, 0.30, 0.2, 0.3, 0.78, 4.0),
    "cdna3": (0.48, 0.42, 0.4, 0.35, 0.30, 0.2, 0.3, 0.7, 4.0),
}
# How fast the cores of one kind run beside those of its family: power and clocks. The 96 GB part has 500 of 700 W.
BY_KIND = {kind: (0.8 if kind == "h100_96gb" else 1.0, 0.08) for kind in KINDS}
_HUBER = 0.1
# Rows that say themselves how little they can be trusted.
_NOISY = (
    "noisy_network_pm40pct_per_source",
    "model_and_batch_not_printed_llama3_8b_bs1_assumed",
    "approximate",
)
_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A case with everything that the fit does not change."""

    case: Case
    kind: str
    stages: tuple[StageShape, ...]
    memory: MemoryCost
    weight: float


def kind_of(gpu: str) -> str:
    return next(kind for kind, words in KINDS.items() if any(word in gpu for word in words))


def load_cases(path: Path) -> list[Case]:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    cases = [case_of(row) for row in rows if (row.get("usable") or {}).get("full_step_time_target")]
    return [case for case in cases if isinstance(case, Case) and case.measured_step_s]


def prepare(cases: Sequence[Case]) -> list[_Prepared]:
    count = Counter((case.source, case.model.name) for case in cases)
    prepared = []
    for case in cases:
        estimator = Estimator(case.problem(case.plan.strategy), case.capabilities)
        noisy = 0.3 if any(flag in _NOISY for flag in case.row.get("flags") or ()) else 1.0
        prepared.append(
            _Prepared(
                case=case,
                kind=kind_of(case.cluster.gpu.name),
                stages=estimator.stages(case.plan),
                memory=estimator.footprint(case.plan).memory,
                weight=noisy * count[case.source, case.model.name] ** -0.4,
            )
        )
    return prepared


def efficiency_of(theta: Mapping[str, float], kind: str) -> Efficiency:
    """Return the parameters of one kind as the planner takes them."""
    values: dict[str, Any] = {name: theta[name] for name in SHARED}
    tables: dict[str, dict[str, float]] = defaultdict(dict)
    for name in _COLUMNS:
        value = theta[f"{FAMILIES[kind]}:{name}"]
        table, _, key = name.partition(".")
        if key:
            tables[table][key] = min(0.98, value * theta[kind])
        else:
            values[name] = value
    tables["matmul"]["fp16"] = tables["matmul"]["bf16"]
    return Efficiency(**values | tables)


def log_ratio(item: _Prepared, efficiency: Efficiency) -> float:
    """Return the logarithm of predicted over measured step time."""
    case = item.case
    cluster = replace(case.cluster, gpu=replace(case.cluster.gpu, efficiency=efficiency))
    timer = StepTimer(
        case.model, training=case.training, cluster=cluster, execution=case.capabilities.execution
    )
    state = case.capabilities.state_bytes_of(case.plan)
    cost = timer.step(case.plan, state=state, memory=item.memory, stages=item.stages)
    assert case.measured_step_s is not None
    return float(np.log(cost.total / case.measured_step_s))


def priors() -> dict[str, tuple[float, float]]:
    found = SHARED | BY_KIND
    for family, values in _PRIORS.items():
        for name, value in zip(_COLUMNS, values, strict=True):
            found[f"{family}:{name}"] = (value, _SIGMA[name.partition(".")[0]])
    return found


def _applies(name: str, kinds: Sequence[str]) -> list[int]:
    """Return the positions of the kinds that a parameter has to do with."""
    family, colon, _ = name.partition(":")
    if colon:
        return [row for row, kind in enumerate(kinds) if FAMILIES[kind] == family]
    return [row for row, kind in enumerate(kinds) if name not in KINDS or name == kind]


def residuals(items: Sequence[_Prepared], theta: Mapping[str, float]) -> np.ndarray:
    efficiencies = {kind: efficiency_of(theta, kind) for kind in {item.kind for item in items}}
    return np.array([log_ratio(item, efficiencies[item.kind]) for item in items])


def fit(
    items: Sequence[_Prepared], start: Mapping[str, float] | None = None, *, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Return the parameters that explain the items best, in the sense of the module's docstring."""
    prior = priors()
    names = list(prior)
    theta = dict(start or {name: value for name, (value, _) in prior.items()})
    kinds = [item.kind for item in items]
    weights = np.array([item.weight for item in items])
    sigma = np.array([prior[name][1] for name in names])
    centre = np.log([prior[name][0] for name in names])
    found = residuals(items, theta)
    for _ in range(rounds):
        jacobian = np.zeros((len(items), len(names)))
        for column, name in enumerate(names):
            rows = _applies(name, kinds)
            if not rows:
                continue
            moved = theta | {name: theta[name] * 1.02}
            jacobian[rows, column] = (residuals([items[row] for row in rows], moved) - found[rows]) / np.log(
                1.02
            )
        robust = weights * np.minimum(1.0, _HUBER / np.maximum(np.abs(found), 1e-9)) / 0.08**2
        now = np.log([theta[name] for name in names])
        left = jacobian.T @ (jacobian * robust[:, None]) + np.diag(1 / sigma**2)
        right = -jacobian.T @ (robust * found) - (now - centre) / sigma**2
        step = np.clip(np.linalg.solve(left, right), -0.3, 0.3)
        theta = {
            name: _bounded(name, float(np.exp(value))) for name, value in zip(names, now + step, strict=True)
        }
        found = residuals(items, theta)
    return theta


def _bounded(name: str, value: float) -> float:
    free = (
        "matmul_half_size",
        "matmul_us",
        "attention_half_tiles",
        "moe_stall_ms",
        "unfused_norm",
        "kernel_us",
        "skew_us",
        "step_ms",
    )
    return value if name in KINDS or name.rpartition(":")[2] in free else min(value, 0.98)


def folds_of(items: Sequence[_Prepared], count: int) -> list[set[str]]:
    """Split the models into `count` sets of about equal numbers of rows."""
    sizes = Counter(item.case.model.name for item in items)
    folds: list[set[str]] = [set() for _ in range(count)]
    rows = [0] * count
    for model, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        least = rows.index(min(rows))
        folds[least].add(model)
        rows[least] += size
    return folds


def cross_validate(items: Sequence[_Prepared], count: int, start: Mapping[str, float]) -> np.ndarray:
    """Return the log ratio of every item under parameters fitted without its model."""
    found = np.zeros(len(items))
    for models in folds_of(items, count):
        theta = fit([item for item in items if item.case.model.name not in models], start, rounds=3)
        rows = [row for row, item in enumerate(items) if item.case.model.name in models]
        found[rows] = residuals([items[row] for row in rows], theta)
    return found


def errors_by_source(items: Sequence[_Prepared], found: np.ndarray) -> dict[str, dict[str, float]]:
    """Return count, bias, median and 90th percentile of the relative errors for each source, and for all rows."""
    groups: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, found, strict=True):
        groups[item.case.source].append(float(np.exp(value)) - 1)
    everything = [error for errors in groups.values() for error in errors]
    return {name: _figures(errors) for name, errors in [*sorted(groups.items()), ("all", everything)]}


def _figures(errors: Sequence[float]) -> dict[str, float]:
    sizes = sorted(map(abs, errors))
    return {
        "n": len(errors),
        "bias": statistics.median(errors),
        "median": statistics.median(sizes),
        "p90": sizes[round(0.9 * (len(sizes) - 1))],
    }


def to_text(figures: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        f"{name:14s} n {row['n']:4.0f}  bias {100 * row['bias']:+6.1f} %  "
        f"median {100 * row['median']:5.1f} %  p90 {100 * row['p90']:5.1f} %"
        for name, row in figures.items()
    ]
    large = [row for name, row in figures.items() if row["n"] >= 5 and name != "all"]
    good = sum(row["median"] <= 0.08 for row in large)
    return "\n".join(
        [*lines, f"sources with 5 rows or more and a median of at most 8 %: {good} of {len(large)}"]
    )


def write(theta: Mapping[str, float], items: Sequence[_Prepared]) -> None:
    """Write one file a kind, with the rows behind it."""
    for kind in KINDS:
        efficiency = efficiency_of(theta, kind)
        rows = [item for item in items if item.kind == kind]
        values = {field.name: getattr(efficiency, field.name) for field in fields(Efficiency)}
        values = {name: _rounded(value) for name, value in values.items()}
        sources = sorted({item.case.source for item in rows})
        values["source"] = (
            f"fitted to {len(rows)} published rows ({', '.join(sources)})" if rows else "priors; no rows"
        )
        text = yaml.safe_dump(values, sort_keys=False, width=110)
        head = "# Written by benchmarks/fit_efficiency.py. Units: launcher/cluster/efficiency.py.\n"
        (FOLDER / f"{kind}.yaml").write_text(head + text)


def _rounded(value: Any) -> Any:
    """Keep three figures, which is more than the rows support."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit efficiencies to published step times.")
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=0, help="cross-validation over models; 0: none")
    parser.add_argument("--write", action="store_true", help="write hydra_configs/efficiency/")
    parser.add_argument("--record", action="store_true", help="write a dated record of both tables")
    arguments = parser.parse_args()
    items = prepare(load_cases(arguments.configs))
    theta = fit(items)
    figures: dict[str, Any] = {"fitted": errors_by_source(items, residuals(items, theta))}
    print(to_text(figures["fitted"]))
    if arguments.folds:
        figures["left_out_by_model"] = errors_by_source(items, cross_validate(items, arguments.folds, theta))
        print(f"left out by model, {arguments.folds} folds")
        print(to_text(figures["left_out_by_model"]))
    if arguments.write:
        write(theta, items)
    if arguments.record:
        words = ["--configs", arguments.configs.name, "--folds", str(arguments.folds)]
        figures["parameters"] = {name: float(f"{value:.4g}") for name, value in theta.items()}
        made = record.create("fit_efficiency", arguments=words, figures=figures)
        print(record.write(made, name="fit_efficiency"))


if __name__ == "__main__":
    main()
