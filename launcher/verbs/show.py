"""What a run directory tells: plan, state, last metrics, predicted against measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from launcher.goodput import ledger
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir, since_replanned, state
from strategies.spec import Plan


def describe(run: RunDir) -> dict[str, Any]:
    """Everything `show` prints, as plain data."""
    plan_data, job = run.plan_data(), run.job()
    events = list(run.events())
    metrics = read(run.metrics_file)
    spent = ledger(events, metrics, now=time.time())
    measured = next((e["measured"] for e in reversed(since_replanned(events)) if "measured" in e), None)
    failure: dict[str, Any] = next(
        (e for e in reversed(events) if e["event"] in ("failed", "launched", "started")), {}
    )
    return {
        "run_dir": str(run.path),
        "state": state(events),
        "failure": failure.get("message"),
        "plan": {f.name: plan_data[f.name] for f in fields(Plan) if f.name in plan_data},
        "step": metrics[-1]["step"] if metrics else 0,
        "num_steps": job.training.num_steps,
        "loss": metrics[-1]["loss"] if metrics else None,
        "validation_loss": next(
            (m["validation_loss"] for m in reversed(metrics) if "validation_loss" in m), None
        ),
        "metrics": metrics[-1] if metrics else None,
        "checkpoints": list(dict.fromkeys(path.name for path in run.tiers(job.checkpoint).committed())),
        "predictions": plan_data["predictions"],
        "measured": measured,
        "comparison": compare(plan_data["predictions"], measured),
        "goodput": None if spent is None else spent.record(),
    }


def compare(
    predictions: Mapping[str, Any], measured: Mapping[str, Any] | None
) -> dict[str, dict[str, float]]:
    """Predicted, measured and their ratio for every figure that has both."""
    pairs = {"memory_bytes": "memory_bytes", "step_s": "step_s"}
    rows: dict[str, dict[str, float]] = {}
    for name, key in pairs.items():
        if measured and measured.get(key) and predictions.get(name):
            rows[name] = {
                "predicted": predictions[name],
                "measured": measured[key],
                "predicted_over_measured": predictions[name] / measured[key],
            }
    return rows


def to_text(facts: Mapping[str, Any]) -> str:
    """`describe`'s facts for a person."""
    plan = facts["plan"]
    degrees = " ".join(
        f"{key}={plan[key]}" for key in ("dp", "tp", "pp", "cp", "ep") if plan[key] > 1 or key == "dp"
    )
    lines = [
        f"run        {facts['run_dir']}",
        f"state      {facts['state']} at step {facts['step']} of {facts['num_steps']}",
        f"plan       {plan['strategy']} {degrees} zero_stage={plan['zero_stage']} "
        f"micro_batch_size={plan['micro_batch_size']} num_microbatches={plan['num_microbatches']} "
        f"recompute={plan['recompute']}",
    ]
    if facts["failure"]:
        lines.append(f"failure    {facts['failure']}")
    if facts["metrics"]:
        last = facts["metrics"]
        speed = last.get("tokens_per_s_per_gpu")  # a traced step has none
        lines.append(
            f"last       loss {last['loss']:.4f}  grad norm {last['grad_norm']:.3f}  "
            f"{'' if speed is None else f'{speed:.0f} tokens/s/GPU  '}{last['step_time_s']:.3f} s/step"
        )
    if facts["validation_loss"] is not None:
        lines.append(f"validation loss {facts['validation_loss']:.4f} nats per token")
    lines.append(f"checkpoints {', '.join(facts['checkpoints']) or 'none'}")
    lines.extend(_comparison_lines(facts["comparison"]))
    if facts["goodput"]:
        lines.append(_goodput_line(facts["goodput"]))
    return "\n".join(lines)


def _comparison_lines(comparison: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = []
    if "step_s" in comparison:
        row = comparison["step_s"]
        lines.append(
            f"step time  predicted {row['predicted']:.3f} s, measured {row['measured']:.3f} s "
            f"(median after warm-up; ratio {row['predicted_over_measured']:.2f})"
        )
    if "memory_bytes" in comparison:
        row = comparison["memory_bytes"]
        lines.append(
            f"memory     predicted {row['predicted'] / 2**30:.2f} GiB, measured {row['measured'] / 2**30:.2f} GiB "
            f"(worst rank; ratio {row['predicted_over_measured']:.2f})"
        )
    return lines


def _goodput_line(spent: Mapping[str, Any]) -> str:
    parts = ("init", "stall", "lost", "idle", "other")
    counted_s = spent["wall_s"] - spent["waited_s"]
    rest = ", ".join(f"{name} {spent[f'{name}_s'] / counted_s:.1%}" for name in parts)
    starts = f"{spent['num_starts']} start{'s' if spent['num_starts'] > 1 else ''}"
    waits = f"{spent['queue_s']:.0f} s in the queue and {spent['paused_s']:.0f} s paused"
    return (
        f"goodput    {spent['goodput']:.1%} of {counted_s:.0f} s in {starts} ({rest}; "
        f"{spent['lost_steps']} steps repeated), beside {waits}"
    )
