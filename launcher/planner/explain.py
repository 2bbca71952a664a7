"""A ranking as text for a person and as the content of plan.json. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import strategies as adapters
from launcher.decode import encode
from launcher.planner.cost import GIB, Candidate, CostBreakdown, parts
from launcher.planner.search import Ranking, usable_bytes
from strategies.spec import Plan

NUM_RUNNERS_UP = 5

LEFT_OUT = (
    "The estimate leaves out: memory fragmentation beyond the reserve, the optimizer's temporary buffers, "
    "data loading, checkpoints, and slow or failing hardware."
)

_PLAN_COLUMNS = (
    ("strategy", "strategy"),
    ("zero", "zero_stage"),
    ("dp", "dp"),
    ("tp", "tp"),
    ("pp", "pp"),
    ("vp", "vp"),
    ("cp", "cp"),
    ("ep", "ep"),
    ("mbs", "micro_batch_size"),
    ("num_mb", "num_microbatches"),
    ("recompute", "recompute"),
)


def table(ranking: Ranking) -> str:
    """Write what was asked, what was chosen and why, and what was not; raise PlanError when nothing fits."""
    best = ranking.choose()
    assert best.cost is not None, "a chosen plan was costed"
    sections = [
        _header(ranking),
        f"chosen    {_describe(best.plan)}",
        _cost(best.cost, ranking),
        _candidates(ranking.candidates[: 1 + NUM_RUNNERS_UP], total=len(ranking.candidates)),
        _rejected(ranking),
        _unpriced(best.plan),
        LEFT_OUT,
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
        },
        "predictions": _predictions(best, ranking),
        "runners_up": [{"plan": encode(c.plan), "predictions": _predictions(c, ranking)} for c in runners_up],
        "num_candidates": len(ranking.candidates),
        "rejected": [
            {"reason": rejection.reason, "count": rejection.count} for rejection in ranking.rejected
        ],
    }


def _predictions(candidate: Candidate, ranking: Ranking) -> dict[str, Any]:
    cost, cluster = candidate.cost, ranking.problem.cluster
    assert cost is not None, "a feasible candidate was costed"
    # On a CPU the figure to compare with is the whole process, the interpreter and libraries included.
    process_bytes = cluster.reserved_gib * GIB if cluster.gpu.device == "cpu" else 0.0
    return {
        "memory_bytes": round(cost.memory.total + process_bytes),
        "memory_bytes_by_part": {name: round(value) for name, value in parts(cost.memory).items()},
        "memory_stage": cost.stage,
        "usable_bytes": round(usable_bytes(cluster)),
        "host_bytes": round(cost.host_bytes),
        "step_s": cost.step_s,
        "step_s_by_part": parts(cost.time),
        "tokens_per_s_per_gpu": cost.tokens_per_s_per_gpu,
        "mfu": cost.mfu,
        "peak_flops": cost.peak_flops,
        "model_flops_per_step": cost.model_flops_per_step,
    }


def _header(ranking: Ranking) -> str:
    problem = ranking.problem
    model, cluster, training = problem.model, problem.cluster, problem.training
    active = f", {_billions(model.num_active_parameters)} active" if model.moe else ""
    unit = "processes" if cluster.gpu.device == "cpu" else "GPUs"
    size = f"{model.num_layers} layers, {_billions(model.num_parameters)} parameters{active}"
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
    return "\n".join(lines)


def _describe(plan: Plan) -> str:
    words = [plan.strategy, f"dp={plan.dp}"]
    words += [
        f"{key}={getattr(plan, key)}"
        for key in ("tp", "pp", "vp", "cp", "ep", "etp")
        if getattr(plan, key) > 1
    ]
    words += [f"zero_stage={plan.zero_stage}", f"micro_batch_size={plan.micro_batch_size}"]
    words += [f"num_microbatches={plan.num_microbatches}", f"recompute={plan.recompute}"]
    words += [
        key for key in ("sequence_parallel", "offload_optimizer", "offload_parameters") if getattr(plan, key)
    ]
    return " ".join(words)


def _cost(cost: CostBreakdown, ranking: Ranking) -> str:
    """Put memory and step time by part side by side."""
    where = f" (stage {cost.stage})" if any(c.plan.pp > 1 for c in ranking.candidates[:1]) else ""
    memory = [(name, f"{value / GIB:.2f}") for name, value in parts(cost.memory).items()]
    memory += [("total", f"{cost.memory.total / GIB:.2f}")]
    if cost.host_bytes:
        memory += [("on the host", f"{cost.host_bytes / GIB:.2f}")]
    seconds = [(name, _seconds(value)) for name, value in parts(cost.time).items() if value]
    seconds += [("total", _seconds(cost.step_s))]
    length = max(len(memory), len(seconds))
    blank = [("", "")]
    rows = [
        (*left, "", *right)
        for left, right in zip(
            memory + blank * (length - len(memory)), seconds + blank * (length - len(seconds)), strict=True
        )
    ]
    return _grid([(f"memory{where}", "GiB", "", "step", "s"), *rows], left_aligned=(0, 2, 3))


def _candidates(candidates: Sequence[Candidate], *, total: int) -> str:
    header = (*(title for title, _ in _PLAN_COLUMNS), "GiB", "s/step", "tokens/s/GPU", "MFU")
    rows = [header, *(_row(candidate) for candidate in candidates)]
    shown = f"{total} plans fit" if total > 1 else "1 plan fits"
    more = (
        f", the best {len(candidates)} of them (chosen first):"
        if total > len(candidates)
        else " (chosen first):"
    )
    recompute = len(_PLAN_COLUMNS) - 1
    return f"{shown}{more}\n{_grid(rows, left_aligned=(0, recompute))}"


def _row(candidate: Candidate) -> tuple[str, ...]:
    cost, plan = candidate.cost, candidate.plan
    assert cost is not None, "a feasible candidate was costed"
    mfu = "-" if cost.mfu is None else f"{100 * cost.mfu:.1f}%"
    predicted = (
        f"{cost.memory.total / GIB:.2f}",
        _seconds(cost.step_s),
        f"{cost.tokens_per_s_per_gpu:.0f}",
        mfu,
    )
    offload = "+offload" if plan.offload_optimizer or plan.offload_parameters else ""
    return (
        *(f"{getattr(plan, key)}" for _, key in _PLAN_COLUMNS[:-1]),
        f"{plan.recompute}{offload}",
        *predicted,
    )


def _rejected(ranking: Ranking) -> str:
    if not ranking.rejected:
        return ""
    width = len(str(max(rejection.count for rejection in ranking.rejected)))
    lines = [f"  {rejection.count:>{width}}  {rejection.reason}" for rejection in ranking.rejected]
    return "\n".join(["rejected:", *lines])


def _unpriced(plan: Plan) -> str:
    """Name the engine keys given that change memory and that the estimate does not follow."""
    keys = adapters.load(plan.strategy).capabilities.unpriced(plan.engine)
    return "\n".join(f"strategy.engine.{key} is passed on but not priced" for key in keys)


def _grid(rows: Sequence[tuple[str, ...]], *, left_aligned: tuple[int, ...]) -> str:
    """Align columns: figures to the right, words to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(widths[column]) if column in left_aligned else text.rjust(widths[column])
            for column, text in enumerate(row)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _seconds(value: float) -> str:
    """Write seconds with three figures that matter."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
