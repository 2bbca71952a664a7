"""A worker whose watching is turned on and off every few steps; started by monitor_overhead.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.monitor_overhead import is_on
from launcher.monitor.metrics import StepMetrics
from launcher.monitor.node import NodeSampler
from launcher.monitor.observe import Observer
from launcher.monitor.traces.tracing import Tracing
from launcher.training import worker
from launcher.training.trainer import Trainer

BLOCK = int(os.environ["MESHWRIGHT_BLOCK"])
ENDS = Path(os.environ["MESHWRIGHT_ENDS"])
_ends: list[float] = []


def watching() -> bool:
    """Tell whether the step at hand is watched: the same on every rank, because all count the same steps."""
    block = len(_ends) // BLOCK
    return block == 0 or is_on(block)


def bare(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        time=0.0,
        consumed_samples=0,
        loss=0.0,
        grad_norm=0.0,
        learning_rate=0.0,
        step_time_s=0.0,
        tokens_per_s_per_gpu=0.0,
        memory_gib=0.0,
    )


class Switched:
    """A sink that hears of watched steps only."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def write(self, metrics: StepMetrics) -> None:
        if watching():
            self._sink.write(metrics)
            # What still waits would be passed on at the cost of the next block.
            if (len(_ends) + 1) % BLOCK == 0:
                self._sink.flush()

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self._sink.close()


def install() -> None:
    """Put the switch in front of what watches, and a clock behind each step."""
    observe, is_due, measure = Observer.observe, Observer.is_due, NodeSampler._measure
    open_sinks, stop_requested = worker._open_sinks, Trainer._stop_requested
    last_from = Tracing._last_from

    def switched_observe(self: Observer, *arguments: Any, **named: Any) -> StepMetrics:
        return observe(self, *arguments, **named) if watching() else bare(named["step"])

    def switched_due(self: Observer, step: int) -> bool:
        return watching() and is_due(self, step)

    def switched_tracing(self: Tracing, number: int) -> int:
        return last_from(self, number) if watching() else 0

    def switched_measure(self: NodeSampler) -> Any:
        return measure(self) if watching() else self.latest

    def switched_sinks(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        return tuple(Switched(sink) for sink in open_sinks(*arguments, **named))

    def timed(self: Trainer, first_step: int) -> bool:
        stopping = stop_requested(self, first_step)
        _ends.append(time.perf_counter())
        return stopping

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (Observer, "observe", switched_observe),
        (Observer, "is_due", switched_due),
        (Tracing, "_last_from", switched_tracing),
        (NodeSampler, "_measure", switched_measure),
        (worker, "_open_sinks", switched_sinks),
        (Trainer, "_stop_requested", timed),
    ]
    for owner, name, function in replaced:
        setattr(owner, name, function)


if __name__ == "__main__":
    install()
    code = worker.main(sys.argv[1:])
    if os.environ.get("RANK", "0") == "0":
        ENDS.write_text(json.dumps(_ends), encoding="utf-8")
    sys.stdout.flush()
    os._exit(code)
