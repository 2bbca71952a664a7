"""A run on a terminal as it goes: progress, curves, ranks, nodes, what happened. Reads the run directory, no more."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.monitor.alerts import Outbox
from launcher.monitor.metrics import read
from launcher.planner.words.tables import describe
from launcher.run_dir import OVER, RunDir, state

_EVERY_S = 1.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_EVENTS = 6


def watch(run: RunDir, *, once: bool, stream: TextIO) -> None:
    """Draw the run again and again until it is over or Ctrl-C; with `once` a single time."""
    console = Console(file=stream)
    if once:
        console.print(frame(run, now=time.time()))
        return
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            live.update(frame(run, now=time.time()), refresh=True)
            if state(list(run.events())) in OVER:
                return
            time.sleep(_EVERY_S)


def frame(run: RunDir, *, now: float) -> RenderableType:
    """Return one picture of the run."""
    records, events = read(run.metrics_file), list(run.events())
    job = run.job()
    title = f"{run.path.name}: {state(events)}"
    parts: list[RenderableType] = [Text(describe(run.plan()), overflow="fold")]
    if records:
        newest = records[-1]
        parts += [
            _progress(newest["step"], job.training.num_steps, records, now),
            _curves(records),
            _figures(records),
        ]
        parts += [table for table in (_ranks(records), _hardware(records)) if table is not None]
    parts += [_happened(events, Outbox(run.metrics, repeat_s=0).told(), now)]
    return Panel(Group(*parts), title=title, title_align="left")


def _progress(step: int, num_steps: int, records: Sequence[Mapping[str, Any]], now: float) -> RenderableType:
    usual_s = statistics.median(record["step_time_s"] for record in records[-20:])
    left = _duration((num_steps - step) * usual_s)
    silent = now - records[-1]["time"]
    words = f"step {step} of {num_steps}, {left} to go, last step {_duration(silent)} ago"
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=num_steps, completed=step, width=_WIDTH), words)
    return row


def _curves(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for key, title in (
        ("loss", "loss"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_s_per_gpu", "tokens/s/GPU"),
        ("step_time_s", "step, s"),
    ):
        values = [record[key] for record in records if math.isfinite(record.get(key, math.nan))]
        if values:
            table.add_row(title, sparkline(values), f"{values[-1]:.4g}")
    return table


def sparkline(values: Sequence[float], *, width: int = _WIDTH) -> str:
    """Draw values as a line of blocks, averaged to `width` of them."""
    size = -(-len(values) // width)
    means = [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _figures(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    wanted = (
        ("mfu", "MFU {:.1%}"),
        ("validation_loss", "validation {:.4f}"),
        ("memory_peak_gib", "peak {:.2f} GiB"),
        ("memory_over_plan", "{:.0%} of the plan"),
        ("data_wait_share", "data wait {:.1%}"),
        ("exposed_communication_s", "exposed communication {:.3g} s"),
        ("goodput", "goodput {:.0%}"),
        ("restarts", "restarts {}"),
        ("checkpoint_age_s", "checkpoint {:.0f} s old"),
    )
    found = [(form, _newest(records, key)) for key, form in wanted]
    return Text("  ".join(form.format(value) for form, value in found if value is not None))


def _ranks(records: Sequence[Mapping[str, Any]]) -> RenderableType | None:
    scores = _newest(records, "straggler_score")
    if not scores:
        return None
    slowest = sorted(scores.items(), key=lambda item: -item[1])[:8]
    return Text("slowest ranks  " + "  ".join(f"{rank}: {score:.2f}" for rank, score in slowest))


def _hardware(records: Sequence[Mapping[str, Any]]) -> RenderableType | None:
    wanted = (
        ("cpu_percent", "processors {:.0f}%"),
        ("host_memory_gib", "memory {:.1f} GiB"),
        ("gpu_percent", "busy {:.0f}%"),
        ("gpu_power_w", "{:.0f} W"),
        ("gpu_temperature_celsius", "{:.0f} degrees"),
    )
    rows: dict[str, list[str]] = {}
    for key, form in wanted:
        for where, value in (_newest(records, key) or {}).items():
            rows.setdefault(where, []).append(form.format(value))
    if not rows:
        return None
    table = Table.grid(padding=(0, 1))
    for where, words in list(rows.items())[:16]:
        table.add_row(where, "  ".join(words))
    return table


def _happened(
    events: Sequence[Mapping[str, Any]], alerts: Sequence[Mapping[str, Any]], now: float
) -> RenderableType:
    told = [(event["time"], event["event"], event.get("message") or _step(event)) for event in events]
    told += [(alert["time"], f"alert {alert['cause']}", alert["text"]) for alert in alerts]
    table = Table.grid(padding=(0, 1))
    for moment, what, words in sorted(told)[-_EVENTS:]:
        table.add_row(f"{_duration(now - moment)} ago", what, Text(words, overflow="ellipsis", no_wrap=True))
    return table


def _step(event: Mapping[str, Any]) -> str:
    return f"step {event['step']}" if "step" in event else ""


def _newest(records: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((record[key] for record in reversed(records) if key in record), None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
