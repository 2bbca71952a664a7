"""The loop on one rank with the fake strategy: no torch, no processes, real files."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import CheckpointPolicy
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.config import ChecksConfig, EvaluationConfig, Job, StrategyConfig, SubmitConfig, SuperviseConfig
from launcher.data.config import DataConfig
from launcher.data.tokens import TokenDataset, prepare
from launcher.errors import BadLossError, CheckpointError
from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import StepMetrics
from launcher.planner.search.ranking import PlanRequest
from launcher.run_dir import RunDir
from launcher.training.saver import RandomState
from launcher.training.trainer import Process, Trainer
from strategies.base import StepResult
from strategies.fake import FakeStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.flushed: list[int] = []  # the newest step of each flush

    def write(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def flush(self) -> None:
        self.flushed.append(self.steps[-1].step)

    def close(self) -> None: ...


NO_RANDOMNESS = Process(
    device_peak_bytes=None,
    random=RandomState(get=dict, set=lambda state: None),
    is_abandoned=lambda: False,
    beat=lambda phase, step: None,
)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("All work and no play makes a dull corpus. " * 400)
    config = DataConfig(source="text", paths=(str(corpus),), cache_dir=str(tmp_path / "cache"))
    return prepare(config, model_vocab_size=264, sequence_length=32)


@pytest.fixture
def job(tiny_model: ModelSpec, training: TrainingSpec) -> Job:
    cluster = ClusterSpec(
        name="here",
        num_nodes=1,
        gpus_per_node=1,
        gpu=GpuSpec(
            name="cpu",
            memory_gib=4,
            memory_gb_per_s=10,
            peak_tflops={"fp32": 0.1},
            device="cpu",
            peak_is_nominal=True,
        ),
        links=(Link(size=None, gb_per_s=1, latency_us=1),),
        host_memory_gib=4,
    )
    return Job(
        model=tiny_model,
        cluster=cluster,
        training=training,
        data=DataConfig(source="stdlib"),
        plan=PlanRequest(),
        strategy=StrategyConfig(name="fake"),
        submit=SubmitConfig(),
        monitor=MonitorConfig(warmup_steps=1),
        checkpoint=CheckpointPolicy(interval=4, keep_last=5),
        evaluation=EvaluationConfig(interval=5, num_sequences=8),
        checks=ChecksConfig(),
    )


@pytest.fixture
def make(tmp_path: Path, job: Job, dataset: TokenDataset, alone: Callable[[], Any]) -> Callable[..., Trainer]:
    run = RunDir(path=tmp_path / "run")
    for folder in (run.metrics, run.checkpoints, run.logs):
        folder.mkdir(parents=True)
    run.plan_file.write_text(json.dumps({"predictions": {"step_s": 1.5, "memory_bytes": 2**30}}))

    def build(*, process: Process = NO_RANDOMNESS, **changes: Any) -> Trainer:
        changed = replace(job, **changes)
        plan = Plan(strategy="fake", dp=1, micro_batch_size=4, num_microbatches=2, precision="fp32")
        strategy = FakeStrategy()
        strategy.setup(plan, changed.model, changed.training, run.weights)
        return Trainer(
            run=run,
            job=changed,
            plan=plan,
            dataset=dataset,
            strategy=strategy,
            ranks=alone(),
            process=process,
            versions={},
            sinks=(Kept(),),
        )

    return build


def losses(trainer: Trainer) -> dict[int, float]:
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    return {metrics.step: metrics.loss for metrics in sink.steps}


def test_every_step_is_reported_once_with_its_numbers(make: Callable[..., Trainer], job: Job) -> None:
    trainer = make()
    assert trainer.train() == "finished"
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    assert [m.step for m in sink.steps] == list(range(1, 11))
    assert [m.consumed_samples for m in sink.steps] == list(range(8, 81, 8))
    assert [m.learning_rate for m in sink.steps] == [job.training.learning_rate_at(s) for s in range(10)]
    assert [m.step for m in sink.steps if m.validation_loss is not None] == [5, 10]
    assert all(m.mfu is None for m in sink.steps), "a nominal peak must not become an MFU"
    assert [m.step for m in sink.steps if m.memory_peak_gib is not None] == [1, 10], "sampled, not every step"
    assert all(m.data_wait_share is not None and 0 < m.data_wait_share < 1 for m in sink.steps)


def test_no_sequences_mean_no_evaluation(make: Callable[..., Trainer]) -> None:
    trainer = make(evaluation=EvaluationConfig(interval=5, num_sequences=0))
    assert trainer.train() == "finished"
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    assert len(sink.steps) == 10 and all(m.validation_loss is None for m in sink.steps)


def test_only_sampled_steps_count_what_experts_get(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStrategy, "counting_experts", lambda self: nullcontext({0: [3, 1]}))
    trainer = make(monitor=MonitorConfig(sample_interval=4))
    trainer.train()
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    told = {metrics.step: metrics.expert_imbalance for metrics in sink.steps}
    assert {step for step, value in told.items() if value == 1.5} == {1, 4, 8}
    assert set(told.values()) == {1.5, None}


def test_checkpoints_come_when_due_and_at_the_end(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.train()
    saved = [json.loads((path / "manifest.json").read_text()) for path in trainer._saver.tiers.committed()]
    assert [manifest["step"] for manifest in saved] == [10, 8, 4]
    assert [manifest["consumed_samples"] for manifest in saved] == [80, 64, 32]
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    assert sink.flushed == [4, 8, 10], "what a restart goes on from has to be in all sinks first"


def test_a_resumed_run_repeats_the_losses_exactly(make: Callable[..., Trainer]) -> None:
    whole = make()
    whole.train()
    for path in whole._saver.tiers.committed()[:2]:
        (path / "manifest.json").unlink()
    resumed = make()
    resumed.restore()
    assert resumed.step == 4
    resumed.train()
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 4}


@pytest.mark.parametrize("name", ["stop_file", "leave_file"])
def test_a_stop_file_ends_the_run_with_a_checkpoint(make: Callable[..., Trainer], name: str) -> None:
    trainer = make()
    getattr(trainer.run, name).touch()
    assert trainer.train() == "stopped"
    assert trainer.step == 1
    assert [path.name for path in trainer._saver.tiers.committed()] == ["step_0000000001"]


def test_stop_at_step_holds_once_and_resume_goes_on(make: Callable[..., Trainer]) -> None:
    trainer = make(stop_at_step=6)
    assert trainer.train() == "stopped"
    assert trainer.step == 6
    again = make(stop_at_step=6)
    again.restore()
    assert again.train() == "finished"
    assert [event["event"] for event in again.run.events() if event["event"] in ("stopped", "finished")] == [
        "stopped",
        "finished",
    ]


def test_all_checkpoints_damaged_is_said_not_restarted(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.train()
    for path in trainer._saver.tiers.committed():
        (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        make().restore()


def test_checkpoints_that_went_away_are_said_not_restarted(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.train()
    shutil.rmtree(trainer.run.checkpoints)
    with pytest.raises(CheckpointError, match="none of the 0 checkpoints"):
        make().restore()


def test_a_run_nobody_waits_for_saves_and_stops(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.process = replace(NO_RANDOMNESS, is_abandoned=lambda: True)
    assert trainer.train() == "stopped"
    assert [path.name for path in trainer._saver.tiers.committed()] == ["step_0000000001"]


def test_another_model_may_not_continue(make: Callable[..., Trainer], tiny_model: ModelSpec) -> None:
    make().train()
    with pytest.raises(CheckpointError, match="num_layers"):
        make(model=replace(tiny_model, num_layers=4)).restore()


def test_measured_figures_are_stored(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.train()
    finished = [event for event in trainer.run.events() if event["event"] == "finished"]
    assert finished[0]["measured"]["step_s"] > 0
    assert finished[0]["measured"]["memory_bytes"] > 0
    assert finished[0]["validation_loss"] > 0


def test_the_prediction_is_held_against_warm_steps(
    make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make()
    with caplog.at_level("INFO"):
        trainer.train()
    compared = [event for event in trainer.run.events() if event["event"] == "compared"]
    assert [event["step"] for event in compared] == [6]  # one step of warm-up and five to compare
    assert any("(predicted 1.500)" in message for message in caplog.messages)


class Recorder:
    """Stands for PyTorch's profiler: a step that only computes."""

    def start(self) -> None: ...

    def mark(self, name: str) -> AbstractContextManager[None]:
        self._name = name
        return nullcontext()

    def stop(self, path: Path) -> None:
        event = {"ph": "X", "ts": 0.0, "dur": 1e6}
        events = [{**event, "name": self._name}, {**event, "name": "aten::mm", "cat": "cpu_op", "tid": 1}]
        path.write_text(json.dumps({"traceEvents": events}))

    def collectives(self) -> list[tuple[str, str]]:
        return []


def test_traced_steps_are_not_held_against_the_prediction(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.monitor.observe._WARM", 1)
    trainer = make(
        process=replace(NO_RANDOMNESS, open_profiler=Recorder),
        monitor=MonitorConfig(warmup_steps=1, trace_interval=3),
    )
    assert trainer.train() == "finished"
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    assert [m.step for m in sink.steps if m.traced] == [3, 6, 9]
    assert [m.step for m in sink.steps if m.idle_s == 0.0] == [3, 6, 9]
    assert [m.step for m in sink.steps if m.tokens_per_s_per_gpu is None] == [3, 6, 9]
    counted = sorted(m.step_time_s for m in sink.steps if m.step > 1 and not m.traced)
    assert sink.steps[-1].step_time_p99_s == counted[-1]
    events = list(trainer.run.events())
    assert [event["step"] for event in events if event["event"] == "compared"] == [8]  # 2 4 5 7 8, once
    assert events[-1]["measured"]["step_s"] == statistics.median(counted)


def test_a_loss_that_is_no_number_stops_before_it_spoils_checkpoints(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    spoil(trainer, monkeypatch, loss=float("nan"))
    with pytest.raises(BadLossError, match="loss of step 6 is nan"):
        trainer.train()
    assert [path.name for path in trainer._saver.tiers.committed()] == ["step_0000000004"]


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_so_does_a_gradient_norm_that_is_no_number(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, norm: float
) -> None:
    trainer = make(checkpoint=CheckpointPolicy(interval=2, keep_last=5))
    spoil(trainer, monkeypatch, grad_norm=norm)
    with pytest.raises(BadLossError, match=f"gradient norm of step 6 is {norm}"):
        trainer.train()
    assert [path.name for path in trainer._saver.tiers.committed()] == ["step_0000000004", "step_0000000002"]
    skipping = make()
    spoil(skipping, monkeypatch, grad_norm=norm, skipped=True)
    assert skipping.train() == "finished"


def test_a_loss_that_leaps_stops_as_well_where_a_rule_says_so(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerant = make()
    spoil(tolerant, monkeypatch, loss=100.0)
    assert tolerant.train() == "finished"
    trainer = make(supervise=SuperviseConfig(spike_factor=3.0))
    spoil(trainer, monkeypatch, loss=100.0)
    with pytest.raises(BadLossError, match=r"step 6 is 100\.0000, more than supervise\.spike_factor=3 times"):
        trainer.train()


def spoil(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, **reported: Any) -> None:
    """Let step 6 report this."""
    whole = trainer.strategy.train_step

    def spoiled(batches: Any, *, learning_rate: float) -> StepResult:
        result = whole(batches, learning_rate=learning_rate)
        return replace(result, **reported) if trainer.step == 5 else result

    monkeypatch.setattr(trainer.strategy, "train_step", spoiled)


def test_batches_that_are_passed_over_are_counted_and_not_trained_on(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    every, consumed = read_by(make(), monkeypatch)
    assert consumed == list(range(8, 81, 8))
    some, consumed = read_by(make(data=DataConfig(source="stdlib", skip_samples=(16, 24, 56))), monkeypatch)
    assert consumed == [8, 16, 40, 48, 56, *range(72, 105, 8)]
    # The rest comes in its order: the third batch of the one is the fifth of the other.
    assert some[:2] == every[:2]
    assert some[2:5] == every[4:7]
    assert some[5:7] == every[8:10]


def read_by(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], list[int]]:
    """What each step was trained on, and the samples consumed after it."""
    trained: list[bytes] = []
    whole = trainer.strategy.train_step

    def step(batches: Any, *, learning_rate: float) -> StepResult:
        trained.append(b"".join(batch.tobytes() for batch in batches))
        return whole(batches, learning_rate=learning_rate)

    monkeypatch.setattr(trainer.strategy, "train_step", step)
    trainer.train()
    sink = trainer.sinks[0]
    assert isinstance(sink, Kept)
    return trained, [metrics.consumed_samples for metrics in sink.steps]


def test_a_rank_tells_what_it_begins(make: Callable[..., Trainer]) -> None:
    beats: list[tuple[str, int]] = []
    trainer = make()
    trainer.process = replace(NO_RANDOMNESS, beat=lambda phase, step: beats.append((phase, step)))
    trainer.train()
    assert beats[:4] == [("warming", 0), *(("stepping", step) for step in (1, 2, 3))]
    assert beats[4:8] == [("saving", 4), ("stepping", 4), ("evaluating", 5), ("stepping", 5)]
    assert beats[-1] == ("saving", 10)


def test_a_rank_that_waits_for_a_save_after_a_fault_says_so(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[tuple[str, int]] = []
    seen: list[tuple[str, int]] = []
    trainer = make()
    trainer.process = replace(NO_RANDOMNESS, beat=lambda phase, step: beats.append((phase, step)))
    monkeypatch.setattr(trainer._saver, "leave", lambda: seen.append(beats[-1]))
    spoil(trainer, monkeypatch, loss=float("nan"))
    with pytest.raises(BadLossError):
        trainer.train()
    assert seen == [("saving", 5)], "the step that failed is not completed"
