"""Several writers as one: which are opened, and what becomes of one that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import StepMetrics
from launcher.monitor.sinks.writers import Writers, open_writers


def test_a_missing_package_is_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps: SimpleNamespace
) -> None:
    for name in ("wandb", "tensorboard.compat.proto", "prometheus_client"):
        monkeypatch.setitem(sys.modules, name, None)
    config = MonitorConfig(prometheus=True, prometheus_textfile=str(tmp_path / "here.prom"))
    writers = open_writers(config, about=steps.about(tmp_path), history=[])
    assert writers.names == ()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" is off: ")[0] for line in lines] == [
        "TensorBoard",
        "W&B",
        "Prometheus",
        "Prometheus' text file",
    ]
    assert all("\n" not in line and "metrics.jsonl has every step" in line for line in lines)


def test_disabled_writers_leave_no_trace(tmp_path: Path, steps: SimpleNamespace) -> None:
    config = MonitorConfig(tensorboard=False, wandb_mode="disabled")
    writers = open_writers(config, about=steps.about(tmp_path), history=[])
    assert writers.names == ()
    assert list(tmp_path.iterdir()) == []


class Broken:
    def write(self, steps: Sequence[StepMetrics]) -> None:
        raise OSError("disk full")

    def close(self) -> None: ...


class Collecting:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, steps: Sequence[StepMetrics]) -> None:
        self.steps += [metrics.step for metrics in steps]

    def close(self) -> None: ...


def test_a_writer_that_fails_is_dropped_and_the_others_go_on(steps: SimpleNamespace) -> None:
    collecting = Collecting()
    writers = Writers({"broken": Broken(), "collecting": collecting})
    for step in (1, 2, 3):
        writers.write(steps.at(step, loss=1.0))
    writers.flush()
    assert writers.names == ("collecting",)
    assert collecting.steps == [1, 2, 3]
    writers.close()


def test_neither_torch_nor_tensorflow_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from launcher.monitor.sinks.writers import About, open_writers\n"
        "from launcher.monitor.config import MonitorConfig\n"
        "about = About(directory=Path(sys.argv[1]), settings={}, plan={})\n"
        "import launcher.monitor.log, launcher.monitor.progress, launcher.monitor.system\n"
        "writers = open_writers(MonitorConfig(), about=about, history=[])\n"
        "assert writers.names == ('TensorBoard', 'W&B'), writers.names\n"
        "writers.close()\n"
        "print(sorted({'torch', 'tensorflow', 'transformers'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(tmp_path / "metrics")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_a_step_late_in_a_run_costs_no_more_than_an_early_one(
    tmp_path: Path, wandb_service: None, steps: SimpleNamespace
) -> None:
    writers = open_writers(MonitorConfig(), about=steps.about(tmp_path), history=[])
    assert writers.names == ("TensorBoard", "W&B")
    durations = []
    for first in range(1, 1001, 50):
        begin = time.perf_counter()
        for step in range(first, first + 50):
            writers.write(steps.at(step, loss=1.0 / step))
        writers.flush()
        durations.append(time.perf_counter() - begin)
    writers.close()
    assert median(durations[-6:]) < 5 * median(durations[:6])
