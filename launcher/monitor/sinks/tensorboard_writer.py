"""TensorBoard: scalars, histograms, the plan as text, the settings as hyper-parameters. No torch, no TensorFlow."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.monitor.metrics import StepMetrics, scalars
from launcher.monitor.sinks.histograms import drawn
from launcher.monitor.sinks.hyper_parameters import PLAIN, hyper_parameters


class TensorBoardWriter:
    """One event file a start, written with the tensorboard package alone (neither torch nor TensorFlow)."""

    def __init__(
        self,
        directory: Path,
        *,
        history: Sequence[StepMetrics],
        settings: Mapping[str, Any],
        plan: Mapping[str, Any],
    ) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.hparams import summary_v2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        # Readers take files in the order of their names: nanoseconds keep quick restarts in order.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._append(file_version="brain.Event:2")
        # A restart hides all points from this step on. Readers ignore the first mark, so each start makes one.
        first_step = history[-1].step + 1 if history else 1
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(step=first_step, session_log=start)
        # One step earlier than what the mark hides, or the next start would hide the text.
        self._append(step=first_step - 1, summary=self._summary(value=[_plan_text(plan)]))
        self._append(step=first_step - 1, summary=summary_v2.hparams_pb(hyper_parameters(settings, plan)))
        self._records.flush()

    def write(self, steps: Sequence[StepMetrics]) -> None:
        for metrics in steps:
            values = [
                self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(metrics).items()
            ]
            values += [_histogram(name, counts) for name, counts in (metrics.histograms or {}).items()]
            self._append(step=metrics.step, wall_time=metrics.time, summary=self._summary(value=values))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _append(self, **values: Any) -> None:
        self._records.write(self._event(**{"wall_time": time.time(), **values}).SerializeToString())


def _histogram(name: str, counts: Mapping[str, int]) -> Any:
    from tensorboard.compat.proto import histogram_pb2, summary_pb2

    borders, numbers = drawn(counts)
    histogram = histogram_pb2.HistogramProto(
        min=borders[0], max=borders[-1], num=sum(numbers), bucket_limit=borders[1:], bucket=numbers
    )
    return summary_pb2.Summary.Value(tag=name, histo=histogram)


def _plan_text(plan: Mapping[str, Any]) -> Any:
    """The plan as a table in Markdown, for the text dashboard."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.text import metadata
    from tensorboard.util import tensor_util

    rows = [f"| {key} | {value} |" for key, value in plan.items() if isinstance(value, PLAIN)]
    text = "\n".join(["| key | value |", "|---|---|", *rows])
    return summary_pb2.Summary.Value(
        tag="plan",
        metadata=metadata.create_summary_metadata(
            display_name="plan", description="What was planned and frozen"
        ),
        tensor=tensor_util.make_tensor_proto(text),
    )
