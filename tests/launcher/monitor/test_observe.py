"""From results to metrics: figures by hand, what ranks add, what a restart remembers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import MetricsFile, StepMetrics
from launcher.monitor.observe import Looks, Observer, Setting, StepTimes, straggler_scores
from strategies.base import StepResult
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

PREDICTIONS = {"memory_bytes": 2**30, "step_s": 2.0, "step_s_by_part": {"bubble": 0.5}}


class Pair:
    """This rank, and another one that says what it is told to."""

    rank = local_rank = 0

    def __init__(self, **other: Any) -> None:
        self._other = other

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        return [value, {**value, **self._other}]


@pytest.fixture
def make(tmp_path: Path, tiny_model: ModelSpec, training: TrainingSpec) -> Any:
    cluster = ClusterSpec(
        name="pair",
        num_nodes=1,
        gpus_per_node=2,
        gpu=GpuSpec(name="G1", memory_gib=4, memory_gb_per_s=10, peak_tflops={"fp32": 0.001}),
        links=(Link(size=None, gb_per_s=1, latency_us=1),),
        host_memory_gib=4,
    )
    opened: list[Observer] = []

    def build(*, peers: Any = None, nominal: bool = False, **config: Any) -> Observer:
        gpu = replace(cluster.gpu, peak_is_nominal=nominal)
        observer = Observer(
            MonitorConfig(sample_interval=2, **config),
            setting=Setting(
                model=tiny_model,
                cluster=replace(cluster, gpu=gpu),
                training=training,
                plan=Plan(strategy="fake", dp=2),
                predictions=PREDICTIONS,
            ),
            peers=peers or Pair(),
            probes=SimpleNamespace(
                device_peak_bytes=lambda: 2**29, device_memory=lambda: (2**28, 2**30), pulse_s=lambda: 0.001
            ),
            metrics_file=tmp_path / "metrics.jsonl",
            events_file=tmp_path / "events.jsonl",
        )
        opened.append(observer)
        return observer

    yield build
    for observer in opened:
        observer.close()


def step(
    observer: Observer, number: int, *, looks: Looks | None = None, seconds: float = 0.5, **changes: Any
) -> StepMetrics:
    result = StepResult(**{"loss": 2.0, "grad_norm": 4.0, "rank_loss": 2.5, **changes})
    return observer.observe(
        result,
        step=number,
        learning_rate=1e-3,
        seconds=seconds,
        waited_s=0.05,
        consumed_samples=8 * number,
        validation_loss=None,
        goodput=0.5,
        looks=looks or Looks(),
    )


def test_figures_of_one_step(make: Callable[..., Observer], tiny_model: ModelSpec) -> None:
    metrics = step(make(), 3)
    assert metrics.perplexity == math.exp(2.0)
    assert metrics.clip_ratio == 0.25  # max_grad_norm is 1
    assert metrics.tokens == 24 * 32
    assert metrics.tokens_per_s_per_gpu == 8 * 32 / 0.5 / 2
    flops = 256 * tiny_model.flops_per_token(32)
    assert metrics.tflops_per_s_per_gpu == pytest.approx(flops / 1e12)
    assert metrics.mfu == pytest.approx(flops / 1e9)
    assert metrics.data_wait_share == pytest.approx(0.1)
    assert metrics.bubble_share == 0.25


def test_no_utilisation_of_an_unknown_peak(make: Callable[..., Observer]) -> None:
    assert step(make(nominal=True), 3).mfu is None


def test_ranks_add_the_worst_of_them(make: Callable[..., Observer]) -> None:
    peers = Pair(
        loss=3.0, peak=1.5, allocated=2**29, rss=3 * 2**30, pulse=0.004, node={"host_memory_gib": {"b": 7.0}}
    )
    metrics = step(make(peers=peers), 2)
    assert (metrics.loss_max, metrics.memory_peak_gib, metrics.memory_allocated_gib) == (3.0, 1.5, 0.5)
    assert (metrics.memory_reserved_gib, metrics.rss_gib, metrics.memory_over_plan) == (1.0, 3.0, 1.5)
    assert metrics.straggler_score == pytest.approx({"0": 1 / 1.6, "1": 1.6}), "one sample is no proof"
    assert metrics.host_memory_gib is not None
    assert metrics.host_memory_gib["b"] == 7.0
    assert len(metrics.host_memory_gib) == 2


def test_one_slow_pulse_weighs_less_than_many(make: Callable[..., Observer]) -> None:
    peers = Pair()
    observer = make(peers=peers)
    scores = []
    for number, pulse in enumerate([0.001, 0.011, 0.011, 0.011, 0.011], start=1):
        peers._other = {"pulse": pulse}
        score = step(observer, 2 * number).straggler_score
        assert score is not None
        scores.append(score["1"])
    assert scores[:2] == pytest.approx([1.0, 1.6])
    assert scores == sorted(scores)
    assert 4 < scores[-1] < 11


@pytest.mark.parametrize("place", [0, 4])
def test_one_chance_is_no_three_samples_in_a_row(make: Callable[..., Observer], place: int) -> None:
    peers = Pair()
    observer, above = make(peers=peers), 0
    for number in range(10):
        peers._other = {"pulse": 0.1 if number == place else 0.001}
        score = step(observer, 2 * number + 2).straggler_score
        assert score is not None
        above += score["1"] > 1.5
    assert above == 1


def test_what_an_engine_does_not_tell_is_left_out(make: Callable[..., Observer]) -> None:
    metrics = step(make(peers=Pair(loss=None, pulse=None)), 2, rank_loss=None)
    assert metrics.loss_max is None
    assert metrics.straggler_score is None


def test_experts_are_compared_over_ranks_and_layers(make: Callable[..., Observer]) -> None:
    # Two stages: the first layer evenly on both ranks together, the second one half on one expert, a third elsewhere.
    peers = Pair(experts={0: [0, 4], 1: [1, 1], 7: [5, 3]})
    metrics = step(make(peers=peers), 2, looks=Looks(expert_tokens={0: [4, 0], 1: [5, 1]}))
    assert metrics.expert_imbalance == 1.5
    assert metrics.expert_imbalance_mean == pytest.approx((1.0 + 1.5 + 1.25) / 3)
    assert step(make(peers=Pair()), 2).expert_imbalance is None
    assert step(make(peers=Pair()), 2, looks=Looks(expert_tokens={0: [0, 0]})).expert_imbalance is None


def test_histograms_of_ranks_are_added_at_the_steps_that_ask(make: Callable[..., Observer]) -> None:
    observer = make(histograms=4)
    assert [observer.wants_histograms(number) for number in (1, 4, 6, 8)] == [False, True, False, True]
    assert not make().wants_histograms(4)
    both = step(observer, 4, looks=Looks(histograms={"weights/a": {1: 2, 3: 1}})).histograms
    assert both == {"weights/a": {"1": 4, "3": 2}}
    assert step(observer, 5).histograms is None


def test_the_first_step_of_a_start_is_asked_for(make: Callable[..., Observer]) -> None:
    observer = make()
    assert observer.is_due(7)
    step(observer, 7)
    assert [observer.is_due(number) for number in (8, 9, 10)] == [True, False, True]


def test_stages_without_a_loss_leave_it_to_the_last(make: Callable[..., Observer]) -> None:
    assert step(make(peers=Pair(loss=None)), 2).loss_max == 2.5


def test_only_sampled_steps_ask_the_others(make: Callable[..., Observer]) -> None:
    observer = make()
    assert [step(observer, number).memory_peak_gib is not None for number in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        True,
    ]


def test_other_ranks_take_part_and_answer_nothing_of_the_whole(make: Callable[..., Observer]) -> None:
    peers = Pair()
    peers.rank = 1
    metrics = step(make(peers=peers), 2)
    assert metrics.loss == 2.0
    assert metrics.memory_peak_gib is None


def test_skipped_steps_and_infinite_norms(make: Callable[..., Observer]) -> None:
    observer = make()
    skipped = step(observer, 1, skipped=True, grad_norm=math.inf, loss=math.inf)
    assert (skipped.clip_ratio, skipped.perplexity, skipped.skipped_steps) == (None, None, 1)
    assert step(observer, 2, grad_norm=0.5).clip_ratio == 1.0


def test_a_restart_goes_on_counting(
    make: Callable[..., Observer], tmp_path: Path, steps: SimpleNamespace
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for number in range(1, 6):
        file.write(steps.at(number, skipped=number == 2, step_time_s=2.0))
    file.close()
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps({"time": steps.first.time, "event": "started"}) + "\n" for _ in range(2))
    )
    metrics = step(make(), 6)
    assert metrics.skipped_steps == 1
    assert metrics.restarts == 1
    assert metrics.step_time_p50_s == 2.0, "the first steps of a start are no measure"
    assert metrics.goodput == 0.5


def test_a_traced_step_counts_for_no_speed(make: Callable[..., Observer], tmp_path: Path) -> None:
    observer, file = make(), MetricsFile(tmp_path / "metrics.jsonl")
    traced = Looks(traced={"traced": True, "communication_s": {"dp": 0.25}, "idle_s": 0.125})
    for number in range(1, 9):
        slow = number in (6, 8)
        metrics = step(observer, number, looks=traced if slow else None, seconds=9.0 if slow else number / 10)
        file.write(metrics)
        assert metrics.step_time_s == (9.0 if slow else number / 10)
    file.close()
    assert (metrics.traced, metrics.communication_s, metrics.idle_s) == (True, {"dp": 0.25}, 0.125)
    assert (metrics.tokens_per_s_per_gpu, metrics.tflops_per_s_per_gpu, metrics.mfu) == (None, None, None)
    assert (metrics.step_time_p50_s, metrics.step_time_p99_s) == (0.5, 0.7)
    assert step(make(), 9).step_time_p99_s == 0.7, "nor behind a restart"


def test_steps_under_another_plan_are_no_measure_of_this_one(
    make: Callable[..., Observer], tmp_path: Path, steps: SimpleNamespace
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for number in range(1, 6):
        file.write(steps.at(number, skipped=number == 2, step_time_s=0.1))
    file.write(steps.at(6, step_time_s=2.0))
    file.close()
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"time": steps.at(5).time, "event": "replanned"}) + "\n"
    )
    metrics = step(make(), 7)
    assert metrics.step_time_p50_s == 2.0, "fewer ranks take longer, and nothing is wrong with that"
    assert metrics.skipped_steps == 1


def test_percentiles_are_those_of_the_window() -> None:
    seconds = np.random.default_rng(0).exponential(size=2500).tolist()
    times = StepTimes()
    assert times.figures() == {}
    for value in seconds:
        times.add(value)
    window = seconds[-1000:]
    found = times.figures()
    assert found["step_time_p50_s"] == statistics.median_low(window)
    assert found["step_time_p99_s"] == sorted(window)[989]
    assert found["step_time_recent_s"] == statistics.median_low(window[-10:])


def test_straggler_scores_compare_with_the_others() -> None:
    assert straggler_scores([1.0]) == {}
    assert straggler_scores([1.0, 3.0]) == {"0": 1 / 3, "1": 3.0}
    seconds = np.random.default_rng(1).exponential(size=9).tolist()
    for rank, score in straggler_scores(seconds).items():
        others = seconds[: int(rank)] + seconds[int(rank) + 1 :]
        assert score == pytest.approx(seconds[int(rank)] / statistics.median(others))
