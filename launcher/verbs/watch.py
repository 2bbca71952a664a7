"""A run on a terminal as it goes: progress, curves, ranks, nodes, what happened. Reads the run directory, no more."""

from __future__ import annotations

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
from launcher.monitor.follow import Followed
from launcher.planner.words.tables import describe
from launcher.run_dir import OVER, RunDir, state
from launcher.verbs.over import End

_EVERY_S = 1.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_EVENTS = 6
_CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "tokens_per_s_per_gpu": "tokens/s/GPU",
    "step_time_s": "step, s",
}


def watch(run: RunDir, *, once: bool, stream: TextIO) -> None:
    """Draw the run again and again until it is over or Ctrl-C; with `once` a single time."""
    console = Console(file=stream)
    steps, end = followed(run), End(run)
    if once:
        console.print(frame(run, steps, now=time.time()))
        return
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            over = _is_finished(run) or end.has_come()
            live.update(frame(run, steps, now=time.time()), refresh=True)
            if over:
                return
            time.sleep(_EVERY_S)


def followed(run: RunDir) -> Followed:
    """Follow what is drawn of each step."""
    return Followed(run.metrics_file, kept=_CURVES)


def frame(run: RunDir, steps: Followed, *, now: float) -> RenderableType:
    """Return one picture of the run."""
    steps.update()
    events, newest = list(run.events()), steps.newest
    stands = state(events)
    parts: list[RenderableType] = [Text(describe(run.plan()), overflow="fold")]
    if newest:
        parts += [_progress(steps, run.job().training.num_steps, now=now, ends=stands in OVER)]
        parts += [_curves(steps), _figures(newest, events, now=now)]
    # A low terminal shows the upper part: the longest tables come last.
    parts += [_happened(events, Outbox(run.metrics, repeat_s=0).told(), now)]
    parts += [table for table in (_ranks(newest), _hardware(newest)) if table is not None]
    return Panel(Group(*parts), title=_plain(f"{run.path.name}: {stands}"), title_align="left")


def _is_finished(run: RunDir) -> bool:
    return state(list(run.events())) == "finished"


def _progress(steps: Followed, num_steps: int, *, now: float, ends: bool) -> RenderableType:
    step, silent = steps.newest["step"], now - steps.newest["time"]
    left = "" if ends else f" {_duration((num_steps - step) * statistics.median(steps.recent_s))} to go,"
    words = f"step {step} of {num_steps},{left} last step {_duration(silent)} ago"
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=num_steps, completed=step, width=_WIDTH), words)
    return row


def _curves(steps: Followed) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for key, title in _CURVES.items():
        if values := steps.curves[key]:
            table.add_row(title, sparkline(values), f"{values[-1]:.4g}")
    return table


def sparkline(values: Sequence[float], *, width: int = _WIDTH) -> str:
    """Draw values as a line of blocks, averaged to `width` of them."""
    size = -(-len(values) // width)
    means = [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _figures(newest: Mapping[str, Any], events: Sequence[Mapping[str, Any]], *, now: float) -> RenderableType:
    wanted = (
        ("mfu", "MFU {:.1%}"),
        ("validation_loss", "validation {:.4f}"),
        ("memory_peak_gib", "peak {:.2f} GiB"),
        ("memory_over_plan", "{:.0%} of the plan"),
        ("data_wait_share", "data wait {:.1%}"),
        ("exposed_communication_s", "exposed communication {:.3g} s"),
        ("goodput", "goodput {:.0%}"),
        ("restarts", "restarts {}"),
    )
    told = [form.format(newest[key]) for key, form in wanted if key in newest]
    saved = next((event["time"] for event in reversed(events) if event["event"] == "checkpoint"), None)
    return Text("  ".join([*told, *([] if saved is None else [f"checkpoint {_duration(now - saved)} old"])]))


def _ranks(newest: Mapping[str, Any]) -> RenderableType | None:
    scores = newest.get("straggler_score")
    if not scores:
        return None
    slowest = sorted(scores.items(), key=lambda item: -item[1])[:8]
    return Text("slowest ranks  " + "  ".join(f"{rank}: {score:.2f}" for rank, score in slowest))


def _hardware(newest: Mapping[str, Any]) -> RenderableType | None:
    wanted = (
        ("cpu_percent", "processors {:.0f}%"),
        ("host_memory_gib", "memory {:.1f} GiB"),
        ("gpu_percent", "busy {:.0f}%"),
        ("gpu_power_w", "{:.0f} W"),
        ("gpu_temperature_celsius", "{:.0f} degrees"),
    )
    rows: dict[str, list[str]] = {}
    for key, form in wanted:
        for where, value in newest.get(key, {}).items():
            rows.setdefault(where, []).append(form.format(value))
    if not rows:
        return None
    table = Table.grid(padding=(0, 1))
    for where, words in list(rows.items())[:16]:
        table.add_row(_plain(where), "  ".join(words))
    return table


def _happened(
    events: Sequence[Mapping[str, Any]], alerts: Sequence[Mapping[str, Any]], now: float
) -> RenderableType:
    told = [(event["time"], event["event"], event.get("message") or _step(event)) for event in events]
    told += [(alert["time"], f"alert {alert['cause']}", alert["text"]) for alert in alerts]
    table = Table.grid(padding=(0, 1))
    for moment, what, words in sorted(told)[-_EVENTS:]:
        table.add_row(f"{_duration(now - moment)} ago", _plain(what), _plain(words))
    return table


def _step(event: Mapping[str, Any]) -> str:
    return f"step {event['step']}" if "step" in event else ""


def _plain(words: str) -> Text:
    """Return words of others as they are: no markup of Rich's, no control codes of a terminal."""
    shown = "".join(letter if letter.isprintable() else " " for letter in words)
    return Text(shown, overflow="ellipsis", no_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
