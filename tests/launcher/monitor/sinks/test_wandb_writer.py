"""W&B, offline, read back from its file."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.monitor.alerts import Outbox
from launcher.monitor.config import MonitorConfig
from launcher.monitor.sinks import wandb_writer
from launcher.monitor.sinks.wandb_writer import WandbWriter, wandb_mode
from launcher.monitor.sinks.writers import open_writers
from strategies.bins import BORDERS

ONLY_WANDB = MonitorConfig(tensorboard=False)


def wandb_file(run_dir: Path) -> Path:
    (file,) = (run_dir / "metrics" / "wandb").glob("offline-run-*/run-*.wandb")
    return file


def test_wandb_holds_every_step_once_over_resumes(
    tmp_path: Path, wandb_service: None, wandb_reader: SimpleNamespace, steps: SimpleNamespace
) -> None:
    run_dir = tmp_path / "my run"
    steps.start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 8), loss=3.0)
    first = wandb_file(run_dir)
    assert [row["_step"] for row in wandb_reader.history(first)] == list(range(1, 8))
    assert {row["train/loss"] for row in wandb_reader.history(first)} == {3.0}

    steps.start(run_dir, config=ONLY_WANDB, resume_at=5, steps=range(6, 11), loss=2.0)
    second = wandb_file(run_dir)
    rows = wandb_reader.history(second)
    assert Counter(row["_step"] for row in rows) == Counter(range(1, 11))
    assert [row["train/loss"] for row in rows] == [3.0] * 5 + [2.0] * 5
    assert second.name == first.name  # the same run id
    assert [row["_timestamp"] for row in rows] == [steps.first.time + step for step in range(1, 11)]

    # A third start, likely within the same second, which W&B answers with another form of folder name.
    steps.start(run_dir, config=ONLY_WANDB, resume_at=8, steps=range(9, 12), loss=1.0)
    rows = wandb_reader.history(wandb_file(run_dir))
    assert [(row["_step"], row["train/loss"]) for row in rows[7:]] == [
        (8, 2.0),
        (9, 1.0),
        (10, 1.0),
        (11, 1.0),
    ]
    assert len(rows) == 11


def test_no_start_waits_while_the_past_is_told(
    tmp_path: Path, wandb_service: None, steps: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, list[int]]] = []

    def log(_writer: WandbWriter, passed: list[Any]) -> None:
        told.append((threading.current_thread().name, [metrics.step for metrics in passed]))

    monkeypatch.setattr(WandbWriter, "_log", log)
    past = [steps.at(1), steps.at(2)]
    writers = open_writers(ONLY_WANDB, about=steps.about(tmp_path / "run"), history=past)
    writers.write(steps.at(3))
    writers.flush()
    assert told == [("meshwright-W&B", [1, 2]), ("meshwright-W&B", [3])]
    writers.close()


def test_wandb_draws_histograms(
    tmp_path: Path, wandb_service: None, wandb_reader: SimpleNamespace, steps: SimpleNamespace
) -> None:
    writers = open_writers(ONLY_WANDB, about=steps.about(tmp_path / "run"), history=[])
    writers.write(steps.at(1, histograms={"gradients/a": {"70": 3, "72": 1}}))
    writers.close()
    (row,) = wandb_reader.history(wandb_file(tmp_path / "run"))
    assert row["gradients/a/_type"] == "histogram"
    assert row["gradients/a/values"] == [3, 0, 1]
    assert row["gradients/a/bins"] == list(BORDERS[69:73])


def test_wandb_leaves_the_report_of_a_crash_to_the_worker(
    tmp_path: Path, wandb_service: None, steps: SimpleNamespace
) -> None:
    before = sys.excepthook
    steps.start(tmp_path / "run", config=ONLY_WANDB, resume_at=0, steps=range(1, 2), loss=3.0)
    assert sys.excepthook is before


def test_wandb_gets_the_settings_and_nothing_else_of_the_machine(
    tmp_path: Path,
    wandb_service: None,
    monkeypatch: pytest.MonkeyPatch,
    wandb_reader: SimpleNamespace,
    steps: SimpleNamespace,
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    run_dir = tmp_path / "run"
    steps.start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 3), loss=3.0)
    kinds = Counter(record.WhichOneof("record_type") for record in wandb_reader.records(wandb_file(run_dir)))
    assert kinds["history"] == 2
    assert not {"stats", "output", "output_raw"} & set(kinds)
    (run,) = (
        r.run for r in wandb_reader.records(wandb_file(run_dir)) if r.WhichOneof("record_type") == "run"
    )
    assert run.project == "meshwright"
    assert run.display_name == "run"
    assert {item.key: item.value_json for item in run.config.update}["plan"] == '{"dp":2}'
    assert not any(path.name == "requirements.txt" for path in run_dir.rglob("*"))
    assert all(b"a-secret-value" not in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())


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
    tmp_path: Path,
    wandb_service: None,
    caplog: pytest.LogCaptureFixture,
    wandb_reader: SimpleNamespace,
    steps: SimpleNamespace,
) -> None:
    run_dir = tmp_path / "run"
    config = MonitorConfig(tensorboard=False, wandb_mode="online")
    steps.start(run_dir, config=config, resume_at=0, steps=range(1, 3), loss=3.0)
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
    steps: SimpleNamespace,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    quiet = wandb_writer._quiet_settings
    monkeypatch.setattr(wandb_writer, "_quiet_settings", lambda cls: {**quiet(cls), "init_timeout": 1})
    run_dir = tmp_path / "run"
    steps.start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 3), loss=3.0)
    assert len(wandb_reader.history(wandb_file(run_dir))) == 2
    (line,) = (r.getMessage() for r in caplog.records if r.name.startswith("launcher"))
    assert line.startswith("W&B records offline under")
    assert "k" * 40 not in line


def test_plan_and_checkpoints_are_named_and_not_sent(
    tmp_path: Path, wandb_service: None, wandb_reader: SimpleNamespace, steps: SimpleNamespace
) -> None:
    run_dir = tmp_path / "run"
    manifest = run_dir / "checkpoints" / "step_0000000002" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"step": 2}')
    (run_dir / "plan.json").write_text("{}")
    events = [
        {"event": "checkpoint", "step": 1},
        {"event": "resumed", "checkpoint": "step_0000000001"},
        {"event": "checkpoint", "step": 2},
    ]
    (run_dir / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    config = MonitorConfig(tensorboard=False, wandb_group="learning rates")
    steps.start(run_dir, config=config, resume_at=0, steps=range(1, 3), loss=3.0)
    records = list(wandb_reader.records(wandb_file(run_dir)))
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert run.run_group == "learning rates"
    artifacts = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    assert [artifact.type for artifact in artifacts] == ["plan", "checkpoints"]
    entries = [(entry.path, entry.ref) for artifact in artifacts for entry in artifact.manifest.contents]
    assert entries == [
        ("plan.json", (run_dir / "plan.json").as_uri()),
        ("checkpoints/step_0000000002/manifest.json", manifest.as_uri()),
    ]
    assert json.loads(artifacts[1].metadata)["lineage"] == [
        {"step": 1, "from": None},
        {"step": 2, "from": "step_0000000001"},
    ]


def test_an_alert_reaches_wandb(
    tmp_path: Path, wandb_service: None, wandb_reader: SimpleNamespace, steps: SimpleNamespace
) -> None:
    run_dir = tmp_path / "run"
    writers = open_writers(ONLY_WANDB, about=steps.about(run_dir), history=[])
    writers.announce("stalled", "no step for 9 s")
    writers.close()
    alerts = [
        r.alert for r in wandb_reader.records(wandb_file(run_dir)) if r.WhichOneof("record_type") == "alert"
    ]
    assert [(alert.title, alert.text) for alert in alerts] == [("stalled", "no step for 9 s")]


def test_alerts_of_earlier_starts_and_of_their_ends_are_there(
    tmp_path: Path, wandb_service: None, wandb_reader: SimpleNamespace, steps: SimpleNamespace
) -> None:
    run_dir = tmp_path / "run"
    steps.start(run_dir, config=ONLY_WANDB, resume_at=0, steps=range(1, 3), loss=3.0)
    outbox = Outbox(run_dir / "metrics", repeat_s=60)
    outbox.tell("lost_rank", "rank 1 was killed", step=2)  # by the launcher, when the workers were gone
    steps.start(run_dir, config=ONLY_WANDB, resume_at=2, steps=range(3, 4), loss=3.0)
    records = wandb_reader.records(wandb_file(run_dir))
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text) for alert in alerts] == [("lost_rank", "rank 1 was killed")]
