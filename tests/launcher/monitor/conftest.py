"""Steps to write, starts of a run, and the readers that the tools themselves bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import MetricsFile, StepMetrics, truncate_after
from launcher.monitor.sinks.writers import About, open_writers

METRICS = StepMetrics(
    step=1,
    loss=2.5,
    grad_norm=0.9,
    learning_rate=3e-4,
    step_time_s=0.11,
    tokens_per_s_per_gpu=12_300.0,
    memory_gib=1.5,
    consumed_samples=8,
    time=1_700_000_000.0,
)
PLAN = {"strategy": "fake", "dp": 2, "predictions": {"step_s": 1.0}}


def at(step: int, **changes: Any) -> StepMetrics:
    return replace(METRICS, step=step, time=METRICS.time + step, **changes)


def about(run_dir: Path) -> About:
    settings = {"plan": {"dp": 2}, "training": {"learning_rate": 3e-4, "num_steps": 7}}
    return About(directory=run_dir / "metrics", settings=settings, plan=PLAN)


def start(run_dir: Path, *, config: MonitorConfig, resume_at: int, steps: range, loss: float) -> None:
    """One start of a run: cut metrics.jsonl back, then train `steps`."""
    file = run_dir / "metrics" / "metrics.jsonl"
    history = truncate_after(file, step=resume_at)
    kept = MetricsFile(file)
    writers = open_writers(config, about=about(run_dir), history=history)
    assert len(writers.names) == 1
    for step in steps:
        kept.write(at(step, loss=loss))
        writers.write(at(step, loss=loss))
    kept.close()
    writers.close()


def tensorboard_points(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def steps() -> SimpleNamespace:
    """`first`, `at(step, ...)`, `about(run_dir)`, `start(run_dir, ...)`, `tensorboard_points(folder, tag)`."""
    return SimpleNamespace(
        first=METRICS, at=at, about=about, start=start, tensorboard_points=tensorboard_points
    )


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MESHWRIGHT_WEBHOOK_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def wandb_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End W&B's own process with the test."""
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield
    import wandb

    wandb.teardown()
