"""StepMetrics, what one step reports, and metrics.jsonl, the file that every other writer follows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.decode import decode
from launcher.errors import RunDirError
from strategies.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Numbers of one finished step, as rank 0 sees them. None means not measured, and is not written."""

    step: int  # steps completed, so the first one is 1
    loss: float  # mean over the global batch, nats
    grad_norm: float  # before clipping
    learning_rate: float
    step_time_s: float
    tokens_per_s_per_gpu: float
    memory_gib: float  # peak so far on this rank's device; on CPU, of the process
    consumed_samples: int
    time: float  # unix seconds
    skipped: bool = False  # fp16 overflow: the optimizer did not move
    mfu: float | None = None  # 0 to 1
    validation_loss: float | None = None
    goodput: float | None = None  # productive share of the wall time since the run was created, 0 to 1

    def record(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def flops_utilisation(
    model: ModelSpec, *, sequence_length: int, tokens_per_s_per_gpu: float, peak_tflops: float | None
) -> float | None:
    """Return MFU: tokens/s/GPU x model FLOPs/token / peak FLOP/s (PaLM, appendix B); None without a peak."""
    if not peak_tflops:
        return None
    return tokens_per_s_per_gpu * model.flops_per_token(sequence_length) / (peak_tflops * 1e12)


class MetricsFile:
    """metrics.jsonl: one JSON object a step, each on disk before the next step begins. Rank 0 only."""

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
    return [decode(StepMetrics, record) for record in kept.values()]


def read(path: Path) -> list[dict[str, Any]]:
    """Return all steps of a metrics.jsonl. A torn last line is left out; other damage is a RunDirError."""
    lines = _lines(path)
    records = [_parse(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    if None in records:
        raise RunDirError(
            f"{path} line {records.index(None) + 1} is damaged; delete that line to read the rest"
        )
    return [record for record in records if record is not None]


def _readable(path: Path) -> Iterator[dict[str, Any]]:
    return (record for record in map(_parse, _lines(path)) if record is not None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirError(f"{path} cannot be read: {error.strerror}") from error


def _parse(line: str) -> dict[str, Any] | None:
    """Return one line as numbers, or None where it is not a whole record."""
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
