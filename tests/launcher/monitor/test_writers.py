from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from launcher.monitor import writers as writers_module
from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import MetricsFile, StepMetrics, truncate_after
from launcher.monitor.writers import TensorBoardWriter, Writers, open_writers, scalars, wandb_mode

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
ONLY_TENSORBOARD = MonitorConfig(wandb=False)
ONLY_WANDB = MonitorConfig(tensorboard=False)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def wandb_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End W&B's own process with the test."""
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield
    import wandb

    wandb.teardown()


def at(step: int, *, loss: float) -> StepMetrics:
    return replace(METRICS, step=step, loss=loss, time=METRICS.time + step)


def start(run_dir: Path, *, config: MonitorConfig, resume_at: int, steps: range, loss: float) -> None:
    """One start of a run: cut metrics.jsonl back, then train `steps`."""
    directory = run_dir / "metrics"
    history = truncate_after(directory / "metrics.jsonl", step=resume_at)
    file = MetricsFile(directory / "metrics.jsonl")
    writers = open_writers(config, directory=directory, settings={"plan": {"dp": 2}}, history=history)
    assert len(writers.names) == 1
    for step in steps:
        file.write(at(step, loss=loss))
        writers.write(at(step, loss=loss))
    file.close()
    writers.close()


def tensorboard_points(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def wandb_file(run_dir: Path) -> Path:
    (file,) = (run_dir / "metrics" / "wandb").glob("offline-run-*/run-*.wandb")
    return file


def test_tensorboard_shows_every_scalar_once(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, history=[])
    full = replace(METRICS, mfu=0.4, validation_loss=2.75)
    writer.write(full)
    writer.write(at(2, loss=2.0))
    writer.close()
    tags = [
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "perf/step_time_s",
        "perf/tokens_per_s_per_gpu",
        "perf/mfu",
        "memory/gib",
        "validation/loss",
    ]
    assert sorted(scalars(full)) == sorted(tags)
    for tag in tags:
        always = tag not in ("perf/mfu", "validation/loss")
        assert [step for step, _ in tensorboard_points(tmp_path, tag)] == ([1, 2] if always else [1])
    assert tensorboard_points(tmp_path, "validation/loss") == [(1, 2.75)]


def test_tensorboard_points_are_on_disk_at_once(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, history=[])
    writer.write(METRICS)
    assert tensorboard_points(tmp_path, "train/loss") == [(1, 2.5)]
    writer.close()


def test_tensorboard_points_are_not_doubled_by_resumes(tmp_path: Path) -> None:
    curves = tmp_path / "metrics" / "tensorboard"
    start(tmp_path, config=ONLY_TENSORBOARD, resume_at=0, steps=range(1, 8), loss=3.0)
    assert len(tensorboard_points(curves, "train/loss")) == 7
    start(tmp_path, config=ONLY_TENSORBOARD, resume_at=5, steps=range(6, 11), loss=2.0)
    start(tmp_path, config=ONLY_TENSORBOARD, resume_at=8, steps=range(9, 10), loss=1.0)
    expected = [(step, 3.0) for step in range(1, 6)] + [(6, 2.0), (7, 2.0), (8, 2.0), (9, 1.0)]
    assert tensorboard_points(curves, "train/loss") == expected


def test_the_plugin_reader_of_tensorboard_agrees(tmp_path: Path) -> None:
    # TensorBoard's server ignores the first restart mark of a folder; EventAccumulator does not.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    start(tmp_path, config=ONLY_TENSORBOARD, resume_at=0, steps=range(1, 8), loss=3.0)
    start(tmp_path, config=ONLY_TENSORBOARD, resume_at=5, steps=range(6, 9), loss=2.0)
    events = EventAccumulator(str(tmp_path / "metrics" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("train/loss")] == list(range(1, 9))


def test_wandb_holds_every_step_once_over_resumes(
    tmp_path: Path, wandb_service: None, wandb_reader: SimpleNamespace
) -> None:
    run_dir = tmp_path / "my run"
    start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 8), loss=3.0)
    first = wandb_file(run_dir)
    assert [row["_step"] for row in wandb_reader.history(first)] == list(range(1, 8))
    assert {row["train/loss"] for row in wandb_reader.history(first)} == {3.0}

    start(run_dir, config=ONLY_WANDB, resume_at=5, steps=range(6, 11), loss=2.0)
    second = wandb_file(run_dir)
    rows = wandb_reader.history(second)
    assert Counter(row["_step"] for row in rows) == Counter(range(1, 11))
    assert [row["train/loss"] for row in rows] == [3.0] * 5 + [2.0] * 5
    assert second.name == first.name  # the same run id
    assert [row["_timestamp"] for row in rows] == [METRICS.time + step for step in range(1, 11)]

    # A third start, likely within the same second, which W&B answers with another form of folder name.
    start(run_dir, config=ONLY_WANDB, resume_at=8, steps=range(9, 12), loss=1.0)
    rows = wandb_reader.history(wandb_file(run_dir))
    assert [(row["_step"], row["train/loss"]) for row in rows[7:]] == [
        (8, 2.0),
        (9, 1.0),
        (10, 1.0),
        (11, 1.0),
    ]
    assert len(rows) == 11


def test_wandb_leaves_the_report_of_a_crash_to_the_worker(tmp_path: Path, wandb_service: None) -> None:
    before = sys.excepthook
    start(tmp_path / "run", config=ONLY_WANDB, resume_at=0, steps=range(1, 2), loss=3.0)
    assert sys.excepthook is before


def test_wandb_gets_the_settings_and_nothing_else_of_the_machine(
    tmp_path: Path, wandb_service: None, monkeypatch: pytest.MonkeyPatch, wandb_reader: SimpleNamespace
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    run_dir = tmp_path / "run"
    start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 3), loss=3.0)
    kinds = Counter(record.WhichOneof("record_type") for record in wandb_reader.records(wandb_file(run_dir)))
    assert kinds["history"] == 2
    assert not {"stats", "output", "output_raw", "artifact"} & set(kinds)
    (run,) = (
        r.run for r in wandb_reader.records(wandb_file(run_dir)) if r.WhichOneof("record_type") == "run"
    )
    assert run.project == "meshwright"
    assert run.display_name == "run"
    assert {item.key: item.value_json for item in run.config.update}["plan"] == '{"dp":2}'
    assert not any(path.name == "requirements.txt" for path in run_dir.rglob("*"))
    assert all(b"a-secret-value" not in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())


def test_a_missing_package_is_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("wandb", "tensorboard.compat.proto"):
        monkeypatch.setitem(sys.modules, name, None)
    writers = open_writers(MonitorConfig(), directory=tmp_path / "metrics", settings={}, history=[])
    assert writers.names == ()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" is off: ")[0] for line in lines] == ["TensorBoard", "W&B"]
    assert all("\n" not in line and "metrics.jsonl has every step" in line for line in lines)


def test_disabled_writers_leave_no_trace(tmp_path: Path) -> None:
    config = MonitorConfig(tensorboard=False, wandb_mode="disabled")
    writers = open_writers(config, directory=tmp_path / "metrics", settings={}, history=[])
    assert writers.names == ()
    assert list(tmp_path.iterdir()) == []


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def write(self, metrics: StepMetrics) -> None:
        self.calls += 1
        raise OSError("disk\nfull")

    def close(self) -> None:
        raise OSError("still full")


class Collecting:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)

    def close(self) -> None: ...


def test_a_writer_that_fails_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, collecting = Broken(), Collecting()
    writers = Writers({"broken": broken, "collecting": collecting})
    for step in (1, 2, 3):
        writers.write(at(step, loss=1.0))
    writers.close()
    assert broken.calls == 1
    assert collecting.steps == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == ["broken is off from step 1 on: disk full"]


def test_a_failing_close_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    Writers({"broken": Broken()}).close()
    assert caplog.record_tuples == [
        ("launcher.monitor.writers", logging.WARNING, "broken could not be closed: still full")
    ]


def test_auto_goes_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode(MonitorConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(MonitorConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(MonitorConfig()) == "offline"
    assert wandb_mode(MonitorConfig(wandb_mode="online")) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(MonitorConfig()) == "disabled"


@pytest.mark.parametrize(
    ("entry", "mode"),
    [
        ("machine api.wandb.ai login user password k", "online"),
        ("machine elsewhere.org login user password k", "offline"),
        ("machine", "offline"),
    ],
)
def test_auto_reads_the_netrc(tmp_path: Path, entry: str, mode: str) -> None:
    (tmp_path / "netrc").write_text(entry + "\n")
    assert wandb_mode(MonitorConfig()) == mode


def test_online_without_a_key_records_offline_and_never_asks(
    tmp_path: Path, wandb_service: None, caplog: pytest.LogCaptureFixture, wandb_reader: SimpleNamespace
) -> None:
    run_dir = tmp_path / "run"
    config = MonitorConfig(tensorboard=False, wandb_mode="online")
    start(run_dir, config=config, resume_at=0, steps=range(1, 3), loss=3.0)
    assert len(wandb_reader.history(wandb_file(run_dir))) == 2
    (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.startswith("W&B records offline under")
    assert line.endswith("no key in WANDB_API_KEY or netrc")


def test_a_server_out_of_reach_means_offline(
    tmp_path: Path,
    wandb_service: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wandb_reader: SimpleNamespace,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    quiet = writers_module._quiet_settings
    monkeypatch.setattr(writers_module, "_quiet_settings", lambda cls: {**quiet(cls), "init_timeout": 1})
    run_dir = tmp_path / "run"
    start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 3), loss=3.0)
    assert len(wandb_reader.history(wandb_file(run_dir))) == 2
    (line,) = (r.getMessage() for r in caplog.records if r.name.startswith("launcher"))
    assert line.startswith("W&B records offline under")
    assert "k" * 40 not in line


def test_neither_torch_nor_tensorflow_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from launcher.monitor.writers import open_writers\n"
        "from launcher.monitor.config import MonitorConfig\n"
        "import launcher.monitor.log, launcher.monitor.progress, launcher.monitor.system\n"
        "writers = open_writers(MonitorConfig(), directory=Path(sys.argv[1]), settings={}, history=[])\n"
        "assert writers.names == ('TensorBoard', 'W&B'), writers.names\n"
        "writers.close()\n"
        "print(sorted({'torch', 'tensorflow', 'transformers'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(tmp_path / "metrics")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_a_step_late_in_a_run_costs_no_more_than_an_early_one(tmp_path: Path, wandb_service: None) -> None:
    writers = open_writers(MonitorConfig(), directory=tmp_path / "metrics", settings={}, history=[])
    assert writers.names == ("TensorBoard", "W&B")
    durations = cost_of(writers, steps=range(1, 1001))
    writers.close()
    assert median(durations[-300:]) < 5 * median(durations[:300])


def cost_of(writers: Writers, *, steps: Sequence[int]) -> list[float]:
    durations = []
    for step in steps:
        begin = time.perf_counter()
        writers.write(at(step, loss=1.0 / step))
        durations.append(time.perf_counter() - begin)
    return durations
