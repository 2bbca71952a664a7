"""TensorBoard, read back with TensorBoard's own readers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import scalars
from launcher.monitor.sinks.tensorboard_writer import TensorBoardWriter
from strategies.bins import BORDERS

ONLY_TENSORBOARD = MonitorConfig(wandb=False)


def test_tensorboard_shows_every_scalar_once(tmp_path: Path, steps: SimpleNamespace) -> None:
    writer = TensorBoardWriter(tmp_path, history=[], settings={}, plan={})
    full = replace(steps.first, mfu=0.4, validation_loss=2.75, straggler_score={"0": 1.0, "1": 2.5})
    writer.write([full, steps.at(2, loss=2.0)])
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
        "perf/straggler_score/0",
        "perf/straggler_score/1",
    ]
    assert sorted(scalars(full)) == sorted(tags)
    for tag in tags:
        always = tag not in ("perf/mfu", "validation/loss") and "straggler" not in tag
        assert [step for step, _ in steps.tensorboard_points(tmp_path, tag)] == ([1, 2] if always else [1])
    assert steps.tensorboard_points(tmp_path, "validation/loss") == [(1, 2.75)]


def test_tensorboard_draws_histograms(tmp_path: Path, steps: SimpleNamespace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path, history=[], settings={}, plan={})
    writer.write([steps.at(1, histograms={"gradients/a": {"70": 3, "72": 1}}), steps.at(2)])
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    (told,) = events.Histograms("gradients/a")
    assert (told.step, told.histogram_value.num) == (1, 4)
    assert list(told.histogram_value.bucket) == [3, 0, 1]
    assert list(told.histogram_value.bucket_limit) == list(BORDERS[70:73])


def test_tensorboard_points_of_a_burst_are_on_disk_behind_it(tmp_path: Path, steps: SimpleNamespace) -> None:
    writer = TensorBoardWriter(tmp_path, history=[], settings={}, plan={})
    writer.write([steps.first])
    assert steps.tensorboard_points(tmp_path, "train/loss") == [(1, 2.5)]
    writer.close()


def test_tensorboard_points_are_not_doubled_by_resumes(tmp_path: Path, steps: SimpleNamespace) -> None:
    curves = tmp_path / "metrics" / "tensorboard"
    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=0, steps=range(1, 8), loss=3.0)
    assert len(steps.tensorboard_points(curves, "train/loss")) == 7
    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=5, steps=range(6, 11), loss=2.0)
    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=8, steps=range(9, 10), loss=1.0)
    expected = [(step, 3.0) for step in range(1, 6)] + [(6, 2.0), (7, 2.0), (8, 2.0), (9, 1.0)]
    assert steps.tensorboard_points(curves, "train/loss") == expected


def test_the_plugin_reader_of_tensorboard_agrees(tmp_path: Path, steps: SimpleNamespace) -> None:
    # TensorBoard's server ignores the first restart mark of a folder; EventAccumulator does not.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=0, steps=range(1, 8), loss=3.0)
    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=5, steps=range(6, 9), loss=2.0)
    events = EventAccumulator(str(tmp_path / "metrics" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("train/loss")] == list(range(1, 9))


def test_the_plan_and_the_settings_stay_readable_over_resumes(tmp_path: Path, steps: SimpleNamespace) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=0, steps=range(1, 8), loss=3.0)
    steps.start(tmp_path, config=ONLY_TENSORBOARD, resume_at=5, steps=range(6, 9), loss=2.0)
    events = EventAccumulator(str(tmp_path / "metrics" / "tensorboard"))
    events.Reload()
    told = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("plan")]
    assert [step for step, _ in told] == [0, 5]
    assert all("| strategy | fake |" in text and "| dp | 2 |" in text for _, text in told)
    (tag,) = [tag for tag in events.PluginTagToContent("hparams") if "session_start" in tag]
    content = events.PluginTagToContent("hparams")[tag]
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["training.learning_rate"].number_value == 3e-4
    assert found["plan.strategy"].string_value == "fake"
