"""A ranking as text for a person and as the content of plan.json. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import strategies as adapters
from launcher.decode import encode
from launcher.planner.cost import GIB, Candidate, CostBreakdown, parts
from launcher.planner.price.estimate import process_bytes, usable_bytes
from launcher.planner.search.order import TIE
from launcher.planner.search.ranking import Ranking
from launcher.planner.words import run_words
from launcher.planner.words.tables import (
    columns_of,
    count_text,
    describe,
    gib_text,
    grid,
    percent_text,
    seconds_text,
)
from strategies.spec import Plan

NUM_RUNNERS_UP = 5

LEFT_OUT = (
    "memory fragmentation beyond the slack",
    "routers that favour some experts",
    "data loading",
    "checkpoints",
    "slow or failing hardware",
)


def table(ranking: Ranking) -> str:
    """Write what was asked, what was chosen and why, and what was not; raise PlanError when nothing fits."""
    best = ranking.choose()
    shown = ranking.candidates[: 1 + NUM_RUNNERS_UP]
    sections = [
        "\n".join(header(ranking)),
        "\n".join([f"chosen    {describe(best.plan)}", headroom(ranking), *searched(ranking)]),
        _candidates(ranking, shown),
        by_part(shown),
        "\n  ".join(["the whole run:", *run_words.run_words(ranking)]),
        _rejected(ranking),
        "\n".join(unpriced(best.plan)),
        left_out(),
    ]
    return "\n\n".join(section for section in sections if section)


def to_json(ranking: Ranking) -> dict[str, Any]:
    """Return plan.json: the chosen plan's fields, its predictions, the runners-up and what was rejected."""
    best = ranking.choose()
    runners_up = ranking.candidates[1 : 1 + NUM_RUNNERS_UP]
    problem = ranking.problem
    return {
        **encode(best.plan),
        "inputs": {
            "model": encode(problem.model),
            "cluster": encode(problem.cluster),
            "training": encode(problem.training),
            "request": encode(problem.request),
            "strategies": list(problem.strategies),
            "calibration": encode(problem.calibration),
        },
        "predictions": predictions(best, ranking),
        "runners_up": [{"plan": encode(c.plan), "predictions": predictions(c, ranking)} for c in runners_up],
        "num_candidates": len(ranking.candidates),
        "search": {
            "num_considered": ranking.num_considered,
            "num_costed": ranking.num_costed,
            "num_slow": ranking.num_slow,
            "limit_s": ranking.limit_s,
        },
        "budget": run_words.to_json(ranking),
        "rejected": [
            {"reason": rejection.reason, "count": rejection.count} for rejection in ranking.rejected
        ],
        "unpriced": unpriced(best.plan),
        "left_out": list(LEFT_OUT),
    }


def predictions(candidate: Candidate, ranking: Ranking) -> dict[str, Any]:
    """Return the predicted cost of one candidate, by part, as plan.json holds it."""
    cost, cluster = cost_of(candidate), ranking.problem.cluster
    return {
        "memory_bytes": round(cost.memory.total + process_bytes(cluster)),
        "memory_bytes_by_part": {name: round(value) for name, value in parts(cost.memory).items()},
        "memory_stage": cost.stage,
        "usable_bytes": round(usable_bytes(cluster)),
        "headroom_bytes": round(usable_bytes(cluster) - cost.memory.total),
        "host_bytes": round(cost.host_bytes),
        "disk_bytes": round(cost.disk_bytes),
        "step_s": cost.step_s,
        "step_s_by_part": parts(cost.time),
        "tokens_per_s_per_gpu": cost.tokens_per_s_per_gpu,
        "mfu": cost.mfu,
        "peak_flops": cost.peak_flops,
        "model_flops_per_step": cost.model_flops_per_step,
    }


def header(ranking: Ranking) -> list[str]:
    """Return what was asked: model, cluster, training, one line each."""
    problem = ranking.problem
    model, cluster, training = problem.model, problem.cluster, problem.training
    active = f", {count_text(model.num_active_parameters)} active" if model.moe else ""
    unit = "processes" if cluster.gpu.device == "cpu" else "GPUs"
    size = f"{model.num_layers} layers, {count_text(model.num_parameters)} parameters{active}"
    lines = [
        f"model     {model.name}: {model.model_type}, {size}",
        f"cluster   {cluster.name}: {cluster.num_nodes} x {cluster.gpus_per_node} {unit} ({cluster.gpu.name}), "
        f"{usable_bytes(cluster) / GIB:.1f} of {cluster.gpu.memory_gib:.1f} GiB usable each",
        f"training  {training.global_batch_size} sequences x {training.sequence_length} tokens a step, "
        f"{training.precision}, {training.num_steps} steps",
    ]
    if cluster.gpu.peak_is_nominal:
        lines.append(
            "          the peak of this device is a guess: times only rank plans, and no MFU is given"
        )
    if problem.calibration is not None:
        lines.append(f"          {problem.calibration.sentence}")
    return lines


def headroom(ranking: Ranking) -> str:
    """Say what the chosen plan leaves free on its fullest rank."""
    best = cost_of(ranking.choose())
    usable = usable_bytes(ranking.problem.cluster)
    free = usable - best.memory.total
    where = f", in pipeline stage {best.stage}" if ranking.choose().plan.pp > 1 else ""
    return (
        f"headroom  {gib_text(free)} GiB ({percent_text(free / usable)}) of the usable memory stay free "
        f"on the fullest rank{where}"
    )


def searched(ranking: Ranking) -> list[str]:
    """Say how many plans there are, and how many of them had to be costed to know the best; nothing where none was."""
    if not ranking.num_considered:
        return []
    words = f"search    {ranking.num_considered:,} legal plans, {ranking.num_costed:,} of them costed in full"
    if ranking.limit_s is not None:
        words += (
            f"; {ranking.num_slow:,} are out because their micro-batches alone take longer than "
            f"{seconds_text(ranking.limit_s)} s a step"
        )
    return [words]


def left_out() -> str:
    """Say what no figure here contains."""
    return f"The estimate leaves out: {', '.join(LEFT_OUT[:-1])}, and {LEFT_OUT[-1]}."


def unpriced(plan: Plan) -> list[str]:
    """Name the engine keys given that change memory and that the estimate does not follow."""
    keys = adapters.capabilities(plan.strategy).unpriced(plan.engine)
    return [f"strategy.engine.{key} is passed on but not priced" for key in keys]


def by_part(shown: Sequence[Candidate]) -> str:
    """Put memory and step time of several candidates side by side, a column each; parts that none has are left out."""
    costs = [cost_of(candidate) for candidate in shown]
    numbers = [str(number) for number in range(1, len(costs) + 1)]
    rows = [("memory of the fullest rank, GiB", *numbers)]
    rows += _rows([parts(cost.memory) for cost in costs], gib_text)
    rows += [("  total", *(gib_text(cost.memory.total) for cost in costs))]
    if any(cost.host_bytes for cost in costs):
        rows += [("  on the host", *(gib_text(cost.host_bytes) for cost in costs))]
    if any(cost.disk_bytes for cost in costs):
        rows += [("  on the disk", *(gib_text(cost.disk_bytes) for cost in costs))]
    if any(candidate.plan.pp > 1 for candidate in shown):
        rows += [("  in pipeline stage", *(str(cost.stage) for cost in costs))]
    rows += [("one step, s", *("" for _ in costs))]
    rows += _rows([parts(cost.time) for cost in costs], seconds_text)
    rows += [("  total", *(seconds_text(cost.step_s) for cost in costs))]
    return grid(rows)


def cost_of(candidate: Candidate) -> CostBreakdown:
    """Return the cost of a candidate that fits."""
    assert candidate.cost is not None, "a feasible candidate was costed"
    return candidate.cost


def _rows(costs: Sequence[dict[str, float]], text: Callable[[float], str]) -> list[tuple[str, ...]]:
    names = [name for name in costs[0] if any(cost[name] for cost in costs)]
    return [(f"  {name}", *(text(cost[name]) if cost[name] else "-" for cost in costs)) for name in names]


def _candidates(ranking: Ranking, shown: Sequence[Candidate]) -> str:
    model, total = ranking.problem.model, len(ranking.candidates)
    columns = columns_of([candidate.plan for candidate in shown], model)
    rows = [("", *(column.title for column in columns), "GiB", "s/step", "tokens/s/GPU", "MFU")]
    for number, candidate in enumerate(shown, start=1):
        cost = cost_of(candidate)
        rows.append(
            (
                str(number),
                *(column.text(candidate.plan, model) for column in columns),
                gib_text(cost.memory.total),
                seconds_text(cost.step_s),
                f"{cost.tokens_per_s_per_gpu:.0f}",
                percent_text(cost.mfu),
            )
        )
    fit = f"{total} plans fit" if total > 1 else "1 plan fits"
    # Slow plans were never asked whether they fit.
    fit += " and may be among the best" if ranking.num_slow else ""
    more = f", the best {len(shown)} of them" if total > len(shown) else ""
    words = [index for index, column in enumerate(columns, start=1) if column.words]
    return "\n".join([f"{fit}{more} (1 is chosen):", grid(rows, words=words), *tie(ranking)])


def tie(ranking: Ranking) -> list[str]:
    """Say why the chosen plan is not the fastest one, where it is not."""
    chosen_s = cost_of(ranking.choose()).step_s
    fastest_s = min(cost_of(candidate).step_s for candidate in ranking.candidates)
    if chosen_s == fastest_s:
        return []
    return [
        f"1 is {percent_text(chosen_s / fastest_s - 1)} slower than the fastest, too little to tell; "
        f"among plans within {percent_text(TIE - 1)} little memory counts first, then simplicity"
    ]


def _rejected(ranking: Ranking) -> str:
    if not ranking.rejected:
        return ""
    width = len(str(max(rejection.count for rejection in ranking.rejected)))
    lines = [f"  {rejection.count:>{width}}  {rejection.reason}" for rejection in ranking.rejected]
    return "\n".join(["rejected:", *lines])
