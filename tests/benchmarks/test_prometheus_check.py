"""How a scrape is held against metrics.jsonl; Prometheus itself runs in the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.prometheus_check import _compare, _label
from launcher.monitor.metrics import MetricsFile, StepMetrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    file = MetricsFile(tmp_path / "metrics" / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write(
            StepMetrics(
                step=step,
                time=0.0,
                consumed_samples=8,
                loss=float(step),
                grad_norm=1.0,
                learning_rate=0.1,
                step_time_s=1.0,
                tokens_per_s_per_gpu=1.0,
                memory_gib=1.0,
                straggler_score={"1": 2.0} if step == 1 else None,
            )
        )
    file.close()
    return tmp_path


def scraped(loss: float) -> list[dict[str, Any]]:
    values = {"step": 2, "loss": loss, "grad_norm": 1, "learning_rate": 0.1, "step_time_seconds": 1}
    values |= {"tokens_per_s_per_gpu": 1, "memory_gibibytes": 1, "straggler_score": 2}
    return [
        {
            "metric": {"__name__": f"meshwright_{name}", "run": "r", "job": "j"}
            | ({"rank": "1"} if name == "straggler_score" else {}),
            "value": [0, str(value)],
        }
        for name, value in values.items()
    ]


def test_a_scrape_is_held_against_the_step_it_names(run: Path) -> None:
    assert _compare(lambda *_, **__: {"result": scraped(2.0)}, run) == 7
    with pytest.raises(AssertionError, match=r"meshwright_loss.*2\.5.*2\.0"):
        _compare(lambda *_, **__: {"result": scraped(2.5)}, run)


def test_the_label_is_what_no_server_added() -> None:
    assert _label({"__name__": "x", "run": "r", "instance": "i", "node": "n"}) == "n"
    assert _label({"__name__": "x", "run": "r"}) is None
