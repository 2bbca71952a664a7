"""StepMetrics, the registry of what a step reports, and metrics.jsonl, the file that every other writer follows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.decode import decode
from launcher.errors import RunDirError
from launcher.monitor.registry import declared, metric, series, tag_of
from strategies.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Numbers of one finished step, as rank 0 sees them; None means not measured, and is not written.

    Those of ranks and nodes come at sampled steps only (`monitor.sample_interval`). Mappings are by rank, node, GPU
    or cause.
    """

    step: int  # steps completed, so the first one is 1
    time: float  # unix seconds
    consumed_samples: int
    skipped: bool = False  # fp16 overflow: the optimizer did not move
    traced: bool | None = None  # a profiler slowed it, so it counts for no speed; None: it did not
    # By tensor, then by bin: how many numbers (strategies/bins.py); of steps with monitor.histograms only.
    histograms: Mapping[str, Mapping[str, int]] | None = None

    loss: float = metric("train/loss", "Mean loss over the global batch", unit="nats", default=...)
    loss_max: float | None = metric("train/loss_max", "Largest mean loss of one rank", unit="nats")
    perplexity: float | None = metric("train/perplexity", "e to the loss")
    grad_norm: float = metric("train/grad_norm", "Norm of the gradients before clipping", default=...)
    clip_ratio: float | None = metric(
        "train/clip_ratio", "What clipping multiplied the gradients by; 1 is nothing"
    )
    expert_imbalance: float | None = metric(
        "train/expert_imbalance", "Tokens of the busiest expert over the mean expert's, worst layer"
    )
    expert_imbalance_mean: float | None = metric(
        "train/expert_imbalance_mean",
        "Tokens of the busiest expert over the mean expert's, mean of the layers",
    )
    learning_rate: float = metric("train/learning_rate", "Learning rate", default=...)
    skipped_steps: int | None = metric(
        "train/skipped_steps", "Steps skipped because fp16 overflowed", counter=True
    )
    tokens: int | None = metric("train/tokens", "Tokens trained on", counter=True)
    validation_loss: float | None = metric(
        "validation/loss", "Mean loss of the validation split", unit="nats"
    )

    step_time_s: float = metric("perf/step_time_s", "Duration of the step", unit="seconds", default=...)
    step_time_p50_s: float | None = metric(
        "perf/step_time_p50_s", "Median of the run's steps", unit="seconds"
    )
    step_time_p99_s: float | None = metric(
        "perf/step_time_p99_s", "99 of 100 steps are faster", unit="seconds"
    )
    step_time_recent_s: float | None = metric(
        "perf/step_time_recent_s", "Median of the newest 10 steps", unit="seconds"
    )
    tokens_per_s_per_gpu: float | None = metric("perf/tokens_per_s_per_gpu", "Training speed of one GPU")
    tflops_per_s_per_gpu: float | None = metric(
        "perf/tflops_per_s_per_gpu", "Model FLOPs a token (docs/monitoring.md) times speed", unit="TFLOP/s"
    )
    mfu: float | None = metric(
        "perf/mfu", "Model FLOPs utilisation, 0 to 1; absent where the peak is unknown"
    )
    data_wait_share: float | None = metric(
        "perf/data_wait_share", "Share of the step that rank 0 waited for data"
    )
    bubble_share: float | None = metric(
        "perf/bubble_share", "Share of a pipeline's step that idles, by the plan"
    )
    communication_s: Mapping[str, float] | None = metric(
        "perf/communication_s", "Communication in a traced step", unit="seconds", label="group"
    )
    exposed_communication_s: float | None = metric(
        "perf/exposed_communication_s",
        "Communication in a traced step that no computing hides",
        unit="seconds",
    )
    idle_s: float | None = metric("perf/idle_s", "Idle in a traced step", unit="seconds")
    straggler_score: Mapping[str, float] | None = metric(
        "perf/straggler_score", "A rank's time for a fixed computation over the others' median", label="rank"
    )

    memory_gib: float = metric("memory/gib", "Peak memory of rank 0", unit="GiB", default=...)
    memory_peak_gib: float | None = metric("memory/peak_gib", "Peak memory of the fullest rank", unit="GiB")
    memory_allocated_gib: float | None = metric(
        "memory/allocated_gib", "In tensors, fullest rank", unit="GiB"
    )
    memory_reserved_gib: float | None = metric(
        "memory/reserved_gib", "Held by the allocator, fullest rank", unit="GiB"
    )
    memory_over_plan: float | None = metric(
        "memory/over_plan", "Peak of the fullest rank over the plan's prediction"
    )
    rss_gib: float | None = metric("memory/rss_gib", "Host memory of the largest worker", unit="GiB")

    restarts: int | None = metric(
        "reliability/restarts", "Starts of the workers after the first", counter=True
    )
    goodput: float | None = metric(
        "reliability/goodput", "Share of the time in steps that count; queue and pauses are left out"
    )
    checkpoint_age_s: float | None = metric(
        "reliability/checkpoint_age_s",
        "Since the newest checkpoint, or the start behind a stop",
        unit="seconds",
    )
    checkpoint_stall_s: float | None = metric(
        "reliability/checkpoint_stall_s", "What the newest checkpoint kept the steps waiting", unit="seconds"
    )
    last_failure_time_s: Mapping[str, float] | None = metric(
        "reliability/last_failure_time_s", "When the run last failed", unit="unix seconds", label="cause"
    )

    cpu_percent: Mapping[str, float] | None = metric(
        "system/cpu_percent", "Load of all cores", unit="%", label="node"
    )
    host_memory_gib: Mapping[str, float] | None = metric(
        "system/host_memory_gib", "Host memory in use", unit="GiB", label="node"
    )
    network_sent_bytes: Mapping[str, float] | None = metric(
        "system/network_sent_bytes", "Sent since the start", unit="bytes", label="node", counter=True
    )
    network_received_bytes: Mapping[str, float] | None = metric(
        "system/network_received_bytes", "Received since the start", unit="bytes", label="node", counter=True
    )
    disk_read_bytes: Mapping[str, float] | None = metric(
        "system/disk_read_bytes", "Read since the start", unit="bytes", label="node", counter=True
    )
    disk_written_bytes: Mapping[str, float] | None = metric(
        "system/disk_written_bytes", "Written since the start", unit="bytes", label="node", counter=True
    )
    gpu_percent: Mapping[str, float] | None = metric(
        "gpu/percent", "Share of time with a kernel running, which is not efficiency", unit="%", label="gpu"
    )
    gpu_power_w: Mapping[str, float] | None = metric("gpu/power_w", "Power drawn", unit="W", label="gpu")
    gpu_temperature_celsius: Mapping[str, float] | None = metric(
        "gpu/temperature_celsius", "Temperature of the chip", unit="degrees", label="gpu"
    )
    gpu_clock_mhz: Mapping[str, float] | None = metric(
        "gpu/clock_mhz", "Clock of the cores", unit="MHz", label="gpu"
    )
    gpu_ecc_errors: Mapping[str, float] | None = metric(
        "gpu/ecc_errors", "Uncorrected memory errors since boot", label="gpu", counter=True
    )
    gpu_nvlink_bytes: Mapping[str, float] | None = metric(
        "gpu/nvlink_bytes", "Sent and received over NVLink", unit="bytes", label="gpu", counter=True
    )

    def record(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


METRICS = declared(StepMetrics)


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return the curves of one step by their tag."""
    return {tag_of(item, where): value for item, where, value in series(vars(metrics), METRICS)}


def sentence(error: Exception) -> str:
    """Say in one line why a sink is off."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed"
    return " ".join(str(error).split()) or type(error).__name__


def flops_utilisation(
    model: ModelSpec, *, sequence_length: int, tokens_per_s_per_gpu: float, peak_tflops: float | None
) -> float | None:
    """Return MFU: tokens/s/GPU x model FLOPs/token / peak FLOP/s (PaLM, appendix B); None without a peak."""
    if not peak_tflops:
        return None
    return tokens_per_s_per_gpu * model.flops_per_token(sequence_length) / (peak_tflops * 1e12)


class MetricsFile:
    """metrics.jsonl: one JSON object a step, each handed to the system before the next step begins. Rank 0 only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        try:
            self._file.write(_line(metrics.record()))
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def flush(self) -> None:
        """Have the system put all steps so far on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()


def truncate_after(path: Path, *, step: int) -> list[StepMetrics]:
    """Drop later steps and damaged lines from metrics.jsonl before a resume; return what is left."""
    kept = {record["step"]: record for record in _readable(path) if record["step"] <= step}
    aside = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in kept.values())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return [_metrics(record) for record in kept.values()]


def _metrics(record: dict[str, Any]) -> StepMetrics:
    """Take a record as it was written; looking at each value, as `decode` does, takes minutes for a million steps."""
    try:
        return StepMetrics(**record)
    except TypeError:
        return decode(StepMetrics, record)  # says what is wrong with it


def read(path: Path) -> list[dict[str, Any]]:
    """Return all steps of a metrics.jsonl. A torn last line is left out; other damage is a RunDirError."""
    lines = _lines(path)
    records = [parse(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    if None in records:
        raise RunDirError(
            f"{path} line {records.index(None) + 1} is damaged; delete that line to read the rest"
        )
    return [record for record in records if record is not None]


def _readable(path: Path) -> Iterator[dict[str, Any]]:
    return (record for record in map(parse, _lines(path)) if record is not None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirError(f"{path} cannot be read: {error.strerror}") from error


def parse(line: str) -> dict[str, Any] | None:
    """Return one line of metrics.jsonl as numbers, or None where it is not a whole record."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return None
        return {name: float(value) if isinstance(value, str) else value for name, value in record.items()}
    except ValueError:
        return None


def _line(record: dict[str, Any]) -> str:
    # Strict JSON has no NaN and no infinity, but a diverging run does: they become text.
    values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(values) + "\n"


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed writer left after the last line end, or the next step would be glued to it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)


def _cannot_write(path: Path, error: OSError) -> RunDirError:
    return RunDirError(f"{path} cannot be written: {error.strerror}; free space there or make it writable")
