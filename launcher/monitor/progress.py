"""Progress of a run: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections import deque
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from launcher.monitor.metrics import StepMetrics

_REMEMBERED_STEPS = 20


class Reporter:
    """Tell a person how far the run is. Rank 0 only."""

    def __init__(self, total_steps: int, *, start_step: int, interval: int, stream: TextIO) -> None:
        self._total_steps = total_steps
        self._interval = interval
        self._stream = stream
        self._recent_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._has_reader = True
        self._bar: Progress | None = None
        if stream.isatty():
            self._bar = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=Console(file=stream)
            )
            self._task = self._bar.add_task("starting", total=total_steps, completed=start_step)
            self._bar.start()

    def write(self, metrics: StepMetrics) -> None:
        """Show one finished step; plain lines come every `interval` steps, and when there is more to say."""
        self._recent_s.append(metrics.step_time_s)
        eta_s = (self._total_steps - metrics.step) * sum(self._recent_s) / len(self._recent_s)
        if self._bar:
            self._bar.update(self._task, completed=metrics.step, description=self._line(metrics, eta_s))
        elif self._is_due(metrics) and self._has_reader:
            try:
                print(self._line(metrics, eta_s), file=self._stream, flush=True)
            except OSError:
                self._has_reader = False  # nobody reads any more; training goes on

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Take the bar away; closing twice is fine."""
        if self._bar:
            self._bar.stop()

    def _line(self, metrics: StepMetrics, eta_s: float) -> str:
        return format_step(metrics, total_steps=self._total_steps, eta_s=eta_s)

    def _is_due(self, metrics: StepMetrics) -> bool:
        remarkable = (
            metrics.skipped or metrics.validation_loss is not None or metrics.step == self._total_steps
        )
        return remarkable or metrics.step % self._interval == 0


def format_step(metrics: StepMetrics, *, total_steps: int, eta_s: float) -> str:
    """Return one step as one line."""
    parts = [
        f"step {metrics.step}/{total_steps}",
        f"loss {metrics.loss:.4g}",
        f"lr {metrics.learning_rate:.1e}",
        f"grad {metrics.grad_norm:.3g}",
        *([f"{_thousands(metrics.tokens_per_s_per_gpu)} tok/s/gpu"] if metrics.tokens_per_s_per_gpu else []),
        f"{metrics.step_time_s:.3g} s",
    ]
    if metrics.traced:
        parts.append("traced")
    if metrics.mfu is not None:
        parts.append(f"mfu {metrics.mfu:.1%}")
    if metrics.validation_loss is not None:
        parts.append(f"validation {metrics.validation_loss:.4g}")
    if metrics.skipped:
        parts.append("skipped: gradients overflowed")
    return " ".join([*parts, f"eta {_duration(eta_s)}"])


def _thousands(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
