"""`meshwright report RUN_DIR ...`: what runs did, as one page; several runs lie on top of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from launcher import __version__
from launcher.planner.cost import GIB, parts
from launcher.planner.words.tables import describe, gib_text, percent_text, seconds_text
from launcher.report import bars, rank_map, timeline
from launcher.report.document import document, section, tiles
from launcher.report.history import history_chart
from launcher.report.markup import legend, table, tag, text
from launcher.report.run_data import RunData
from launcher.report.step_curves import MOST_POINTS, Curve, chart
from launcher.report.style import hue
from launcher.report.system_charts import system_charts
from launcher.report.traced_steps import traced_steps


def run_page(runs: Sequence[RunData]) -> str:
    """Return the page of one run, or of several beside each other."""
    first = runs[0]
    title = first.name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return document(
        f"Run: {title}",
        tag("h1", text(title)),
        tag("p", text(_told(first))) if len(runs) == 1 else _legend(runs),
        *(_tiles(run, alone=len(runs) == 1) for run in runs),
        section("What ran", _what_ran(runs)),
        section("Curves", _curves(runs)),
        section("Predicted and measured", _compared(runs), _parts(runs), traced_steps(runs)),
        section("Where the time went", history_chart([(run.name, run.spans) for run in runs])),
        section("What happened", _events(runs)),
        section("Alerts", _alerts(runs)),
        section("Nodes and GPUs", system_charts(runs)),
        *(section(f"The plan of {run.name}" if len(runs) > 1 else "The plan", _plan(run)) for run in runs),
        section("Environment", _environment(runs)),
        tag(
            "footer", text(f"Meshwright {__version__}. The formula of model FLOPs is in docs/monitoring.md.")
        ),
    )


def _told(run: RunData) -> str:
    model, cluster = run.job.model, run.job.cluster
    place = f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    return (
        f"{model.name}, {model.num_parameters / 1e6:,.1f} M parameters, on {place} with {run.plan.strategy}."
    )


def _legend(runs: Sequence[RunData]) -> str:
    return legend((hue(run.number), f"{run.name}: {_told(run)}") for run in runs)


def _tiles(run: RunData, *, alone: bool) -> str:
    loss, validation, speed = (
        run.newest("loss"),
        run.newest("validation_loss"),
        run.newest("tokens_per_s_per_gpu"),
    )
    entries = [
        ("step", str(run.newest("step") or 0), f"of {run.job.training.num_steps}, {run.state}"),
        ("loss", _number(loss), f"nats, validation {validation:.4f}" if validation is not None else "nats"),
        ("speed", _number(speed, ".0f"), "tokens/s/GPU"),
        ("model FLOPs utilisation", percent_text(run.newest("mfu")), ""),
        ("goodput", percent_text(run.newest("goodput")), "of the time in steps that count"),
        ("peak memory", _number(run.newest("memory_peak_gib"), ".2f"), "GiB, fullest rank"),
        ("restarts", _number(run.newest("restarts"), "d"), ""),
    ]
    shown = tiles([entry for entry in entries if entry[1] != "-"])
    return shown if alone else tag("h3", text(run.name)) + shown


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _what_ran(runs: Sequence[RunData]) -> str:
    rows: list[tuple[str, Callable[[RunData], str]]] = [
        ("plan", lambda run: describe(run.plan)),
        (
            "batch",
            lambda run: f"{run.job.training.global_batch_size} x {run.job.training.sequence_length} tokens",
        ),
        ("learning rate", lambda run: f"{run.job.training.learning_rate:g}"),
        ("precision", lambda run: run.job.training.precision),
        ("seed", lambda run: str(run.job.training.seed)),
        ("data", lambda run: f"{run.job.data.source}, {run.env.get('dataset_hash', '')[:12]}"),
        ("created", lambda run: str(run.env.get("created", "-"))),
    ]
    return _facts(runs, rows, caption="The same rows for every run")


def _facts(
    runs: Sequence[RunData], rows: Sequence[tuple[str, Callable[[RunData], str]]], *, caption: str
) -> str:
    cells = [(name, *(tell(run) for run in runs)) for name, tell in rows]
    return table(("", *(run.name for run in runs)), cells, caption=caption, words=tuple(range(len(runs) + 1)))


def _curves(runs: Sequence[RunData]) -> str:
    def every(key: str, **more: Any) -> list[Curve]:
        return [curve for run in runs for curve in run.curve(key, **more)]

    charts = [
        chart(
            [*every("loss"), *every("validation_loss", label="validation", dash=1)],
            name="loss",
            title="Loss",
            unit="nats",
        ),
        chart(every("grad_norm"), name="norm", title="Gradient norm before clipping", unit=""),
        chart(every("learning_rate"), name="rate", title="Learning rate", unit=""),
        chart(every("tokens_per_s_per_gpu"), name="speed", title="Speed of one GPU", unit="tokens/s"),
        chart(
            [*every("step_time_recent_s"), *every("step_time_p99_s", label="99th percentile", dash=1)],
            name="steptime",
            title="Step time, median of 10",
            unit="s",
        ),
        chart(
            every("data_wait_share"),
            name="wait",
            title="Share of the step that rank 0 waited for data",
            unit="",
        ),
        chart(every("memory_peak_gib"), name="peak", title="Peak memory of the fullest rank", unit="GiB"),
        chart(every("straggler_score"), name="straggler", title="Straggler score of each rank", unit=""),
        chart(every("goodput"), name="goodput", title="Goodput", unit=""),
        chart(
            [*every("expert_imbalance"), *every("expert_imbalance_mean", label="mean layer", dash=1)],
            name="experts",
            title="Tokens of the busiest expert over the mean, worst layer",
            unit="",
        ),
    ]
    names = legend((hue(run.number), run.name) for run in runs) if len(runs) > 1 else ""
    thinned = any(len(run.records) > MOST_POINTS for run in runs)
    told = (
        f"Longer curves are drawn as {MOST_POINTS} means, which flatten a single step's spike."
        if thinned
        else ""
    )
    return (
        names + tag("div", *charts, class_="charts") + tag("p", text(told), class_="faint")
        if any(charts)
        else ""
    )


def _compared(runs: Sequence[RunData]) -> str:
    figures: list[tuple[str, str, Callable[[float], str]]] = [
        ("step", "step_s", lambda value: f"{seconds_text(value)} s"),
        ("peak memory", "memory_bytes", lambda value: f"{gib_text(value)} GiB"),
    ]
    rows = []
    for run in runs:
        for name, key, write in figures:
            predicted, measured = run.predictions.get(key), run.measured.get(key)
            if predicted and measured:
                rows.append(
                    (run.name, name, write(predicted), write(measured), f"{measured / predicted - 1:+.1%}")
                )
    if not rows:
        return tag("p", "Nothing is measured before the steps are warm.")
    return table(
        ("run", "", "predicted", "measured", "measured is off by"),
        rows,
        caption="Median step after warm-up; memory of the fullest rank",
        words=(0, 1),
    )


def _parts(runs: Sequence[RunData]) -> str:
    """What the planner expected a step to consist of."""
    steps = [(_short(run.name), parts(run.cost().time)) for run in runs]
    return tag("p", "The prediction by part:") + bars.time_bars(steps)


def _short(name: str) -> str:
    return name if len(name) <= 10 else f"{name[:9]}…"


def _events(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        first = run.events[0]["time"] if run.events else 0.0
        for event in run.events:
            if event["event"] not in ("checkpoint", "compared"):
                told = {
                    k: v for k, v in event.items() if k in ("step", "message", "checkpoint", "cause", "hosts")
                }
                words = ", ".join(f"{key} {_plain(value)}" for key, value in told.items())
                rows.append((run.name, f"{event['time'] - first:.0f} s", event["event"], words))
    return (
        table(("run", "after", "event", ""), rows, caption="Without checkpoints", words=(0, 2, 3))
        if rows
        else ""
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _alerts(runs: Sequence[RunData]) -> str:
    rows = [
        (run.name, _moment(alert["time"]), alert["cause"], alert["text"])
        for run in runs
        for alert in run.alerts
    ]
    return table(("run", "when", "cause", ""), rows, caption="UTC", words=(0, 1, 2, 3)) if rows else ""


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _plan(run: RunData) -> str:
    cost, cluster = run.cost(), run.job.cluster
    usable = run.predictions["usable_bytes"]
    memory = bars.memory_bars(
        [(cost.stage, cost.memory)], usable_bytes=usable, gpu_bytes=cluster.gpu.memory_gib * GIB
    )
    words = f"Drawn is the fullest of {run.plan.pp} stages." if run.plan.pp > 1 else ""
    pictures = memory + timeline.timeline_chart(run.plan, cost) + rank_map.rank_map(run.plan, cluster)
    shown = tag("p", tag("strong", text(describe(run.plan)))) + tag("p", text(words))
    return shown + _renamed(pictures, run.number)


def _renamed(pictures: str, number: int) -> str:
    """Give each run's pictures names of their own: ids are unique on a page."""
    for name in ("memory", "schedule", "ranks"):
        for part in ("title", "text"):
            pictures = pictures.replace(f"{name}-{part}", f"{name}{number}-{part}")
    return pictures


def _environment(runs: Sequence[RunData]) -> str:
    def versions(run: RunData) -> str:
        found = run.env.get("versions", {})
        return ", ".join(f"{name} {version}" for name, version in found.items())

    rows: list[tuple[str, Callable[[RunData], str]]] = [
        ("hosts", lambda run: _plain(run.env.get("hosts", "-"))),
        ("command", lambda run: _plain(run.env.get("command", "-"))),
        ("git commit", lambda run: _git(run)),
        ("versions", versions),
    ]
    return _facts(runs, rows, caption="As frozen with the run")


def _git(run: RunData) -> str:
    found = run.env.get("git")
    return str(found.get("commit", "-"))[:12] if isinstance(found, dict) else "-"
