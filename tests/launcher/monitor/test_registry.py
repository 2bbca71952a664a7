"""The registry: every metric described, one name each in every sink, and names that Prometheus accepts."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

from launcher.monitor.metrics import METRICS, StepMetrics
from launcher.monitor.registry import Metric, series, tag_of


def test_every_number_of_a_step_is_a_metric_or_says_what_step_it_is() -> None:
    assert {f.name for f in fields(StepMetrics)} - {item.name for item in METRICS} == {
        "step",
        "time",
        "consumed_samples",
        "skipped",
        "traced",
        "histograms",
    }


def test_names_are_unique_and_described() -> None:
    assert len({item.tag for item in METRICS}) == len({item.exposed for item in METRICS}) == len(METRICS)
    for item in METRICS:
        assert re.fullmatch(r"meshwright_[a-z0-9_]+", item.exposed)
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", item.tag)
        assert len(item.text) > 10 or item.text in ("Learning rate", "Power drawn"), item.name
        assert item.label in (None, "rank", "group", "node", "gpu", "cause")


def test_units_end_the_exposed_name() -> None:
    exposed = {item.name: item.exposed for item in METRICS}
    assert exposed["step_time_p99_s"] == "meshwright_step_time_p99_seconds"
    assert exposed["memory_peak_gib"] == "meshwright_memory_peak_gibibytes"
    assert exposed["network_sent_bytes"] == "meshwright_network_sent_bytes_total"
    assert exposed["tokens_per_s_per_gpu"] == "meshwright_tokens_per_s_per_gpu"
    assert exposed["loss"] == "meshwright_loss"


def test_a_metric_without_a_default_is_one_of_every_step() -> None:
    needed = {f.name for f in fields(StepMetrics) if f.default is MISSING and "metric" in f.metadata}
    assert needed == {
        "loss",
        "grad_norm",
        "learning_rate",
        "step_time_s",
        "memory_gib",
    }


def test_a_labelled_metric_is_one_curve_for_each_value() -> None:
    plain = Metric(name="loss", tag="train/loss", unit="nats", text="Mean loss")
    by_rank = Metric(name="score", tag="perf/score", unit="", text="Slowness", label="rank")
    found = list(series({"loss": 2, "score": {"0": 1.0, "1": 1.5}}, (plain, by_rank)))
    assert found == [(plain, None, 2.0), (by_rank, "0", 1.0), (by_rank, "1", 1.5)]
    assert [tag_of(item, where) for item, where, _ in found] == ["train/loss", "perf/score/0", "perf/score/1"]
    assert plain.help == "Mean loss (nats)"
    assert by_rank.help == "Slowness"
