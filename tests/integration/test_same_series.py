"""One run, two ranks, a forced restart: five sinks tell the same numbers at the same steps, by their own readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.monitor.metrics import METRICS, read
from launcher.monitor.registry import series, tag_of

NUM_STEPS, EVERY, TRACED = 64, 16, 6
WORDS = (
    *(
        "cluster.gpus_per_node=2",
        "data.max_bytes=200000",
        "training.sequence_length=32",
        "model.num_layers=2",
    ),
    *("training.global_batch_size=8", f"training.num_steps={NUM_STEPS}", "checkpoint.interval=8"),
    *("monitor.prometheus=true", "monitor.prometheus_port=0", "monitor.sample_interval=4"),
    *("monitor.mlflow=true", f"monitor.histograms={EVERY}", f"monitor.trace_interval={TRACED}"),
)
Point = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A finished run, and what scrapes found on the way."""

    run: Path
    scrapes: list[dict[str, float]]
    resumed_at: int


def scrape(run: Path) -> dict[str, float] | None:
    """Name and label to number, under the tag that the other sinks use."""
    try:
        url = (run / "metrics" / "prometheus.url").read_text().strip()
        with urllib.request.urlopen(url, timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except (OSError, urllib.error.URLError):
        return None
    by_name = {item.exposed: item for item in METRICS}
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        item = by_name.get(sample.name)
        where = None if item is None or item.label is None else sample.labels[item.label]
        found[sample.name if item is None else tag_of(item, where)] = sample.value
    return found or None


def watch(
    command: list[str],
    run: Path,
    scrapes: list[dict[str, float]],
    *,
    kill_after: int | None,
    environment: Mapping[str, str],
) -> None:
    """Run to the end, or to the death of rank 1 some steps behind a checkpoint; scrape all the while."""
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None:
            assert time.monotonic() < deadline, "the run did not end"
            found = scrape(run)
            if found is not None:
                scrapes.append(found)
                if kill_after is not None and found["meshwright_step"] > kill_after:
                    kill_rank_1(run)
                    kill_after = None
            time.sleep(0.05)
        assert process.stderr is not None
        process.stderr.read()


def kill_rank_1(run: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "launcher.training.worker" in words and str(run) in words and process.environ().get("RANK") == "1":
            process.kill()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, mlflow_environment: dict[str, str]) -> Told:
    run = tmp_path_factory.mktemp("same") / "run"
    scrapes: list[dict[str, float]] = []
    start = [sys.executable, "-m", "launcher"]
    watch(
        [*start, "train", *WORDS, f"run_dir={run}"],
        run,
        scrapes,
        kill_after=19,
        environment=mlflow_environment,
    )
    watch([*start, "resume", str(run)], run, scrapes, kill_after=None, environment=mlflow_environment)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    assert resumed, "nothing was restarted"
    return Told(run=run, scrapes=scrapes, resumed_at=resumed[0])


@pytest.fixture(scope="module")
def truth(told: Told) -> dict[Point, float]:
    """Tag and step to number, by metrics.jsonl."""
    return {
        (tag_of(item, where), record["step"]): value
        for record in read(told.run / "metrics" / "metrics.jsonl")
        for item, where, value in series(record, METRICS)
    }


def test_metrics_jsonl_has_every_step_once(told: Told, truth: dict[Point, float]) -> None:
    records = read(told.run / "metrics" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert 0 < told.resumed_at < NUM_STEPS
    assert records[-1]["restarts"] == 1
    sampled = [record["step"] for record in records if "memory_peak_gib" in record]
    assert sampled == sorted({1, told.resumed_at + 1, *range(4, NUM_STEPS + 1, 4)})
    traced = [record["step"] for record in records if "idle_s" in record]
    asked = range(TRACED, NUM_STEPS + 1, TRACED)
    assert traced == [step for step in asked if not told.resumed_at < step <= told.resumed_at + 3]
    assert {"perf/communication_s/dp", "perf/exposed_communication_s"} <= {tag for tag, _ in truth}
    assert {"perf/straggler_score/0", "perf/straggler_score/1", "train/loss_max"} <= {tag for tag, _ in truth}


def test_tensorboard_tells_the_same(told: Told, truth: dict[Point, float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(told.run / "metrics" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = [((tag, e.step), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len(found) == len(dict(found)), "a step twice"
    assert dict(found) == {point: float(np.float32(value)) for point, value in truth.items()}


def test_wandb_tells_the_same(told: Told, truth: dict[Point, float], wandb_reader: SimpleNamespace) -> None:
    (file,) = (told.run / "metrics" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = wandb_reader.history(file)
    assert [row["_step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    found = {
        (tag, row["_step"]): value
        for row in rows
        for tag, value in row.items()
        if not tag.startswith(("_", "weights/", "gradients/"))
    }
    assert found == truth


def test_mlflow_tells_the_same(
    told: Told, truth: dict[Point, float], mlflow_reader: Callable[[Path], list[Any]]
) -> None:
    (run,) = mlflow_reader(told.run / "metrics" / "mlflow")
    found = [((tag, step), value) for tag, step, value in run["points"]]
    assert len(found) == len(dict(found)), "a step twice"
    assert dict(found) == truth


def test_histograms_are_told_alike_and_count_every_weight(told: Told, wandb_reader: SimpleNamespace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = read(told.run / "metrics" / "metrics.jsonl")
    kept = {record["step"]: record["histograms"] for record in records if "histograms" in record}
    assert sorted(kept) == list(range(EVERY, NUM_STEPS + 1, EVERY))
    names = set(kept[EVERY])
    assert {"weights/lm_head.weight", "gradients/model.layers.1.mlp.up_proj.weight"} <= names
    config = json.loads((told.run / "weights" / "config.json").read_text())
    head = config["vocab_size"] * config["hidden_size"]
    assert sum(kept[EVERY]["weights/lm_head.weight"].values()) == head

    events = EventAccumulator(str(told.run / "metrics" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["histograms"]) == names
    (file,) = (told.run / "metrics" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = {row["_step"]: row for row in wandb_reader.history(file)}
    for name in names:
        drawn = [(event.step, list(event.histogram_value.bucket)) for event in events.Histograms(name)]
        assert drawn == [(step, rows[step][f"{name}/values"]) for step in sorted(kept)]
        assert [sum(counts) for _, counts in drawn] == [
            sum(kept[step][name].values()) for step in sorted(kept)
        ]


def test_every_scrape_is_one_step_of_them(told: Told, truth: dict[Point, float]) -> None:
    """Steps that the restart took back were shown before; from the resume on they are those that count."""
    again = next(i for i, s in enumerate(told.scrapes) if s.get("reliability/restarts") == 1.0)
    checked = set()
    for scraped in told.scrapes[again:]:
        step = int(scraped["meshwright_step"])
        for tag, value in scraped.items():
            if not tag.startswith("meshwright_"):
                newest = max(s for t, s in truth if t == tag and s <= step)
                assert value == truth[tag, newest], (tag, step)
        checked.add(step)
    assert len(checked) > 3
    before = {int(s["meshwright_step"]): s for s in told.scrapes[:again]}
    for step, scraped in before.items():
        if step <= told.resumed_at:
            assert scraped["train/loss"] == truth["train/loss", step]


def test_the_restart_is_told_once_also_where_nobody_listens(told: Told) -> None:
    lines = (told.run / "metrics" / "alerts.jsonl").read_text().splitlines()
    # A crowded machine may have been slow as well.
    assert [json.loads(line)["cause"] for line in lines].count("lost_rank") == 1


def test_without_the_packages_a_run_trains_and_says_what_is_off(
    tmp_path: Path, shell: Callable[..., Any]
) -> None:
    missing = tmp_path / "missing"
    missing.mkdir()
    for name in ("tensorboard", "wandb", "mlflow", "prometheus_client"):
        (missing / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name='{name}')\n")
    words = [word.replace(str(NUM_STEPS), "4") for word in WORDS if "gpus_per_node" not in word]
    outcome = shell(
        *("train", "strategy=fake", "cluster.gpus_per_node=1", *words, f"run_dir={tmp_path / 'run'}"),
        PYTHONPATH=f"{missing}{os.pathsep}{Path(__file__).parents[2]}",
    )
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if " is off: " in line]
    assert [line.split(";")[0] for line in lines] == [
        "warning: TensorBoard is off: the package tensorboard is not installed",
        "warning: W&B is off: the package wandb is not installed",
        "warning: MLflow is off: the package mlflow is not installed",
        "warning: Prometheus is off: the package prometheus_client is not installed",
    ]
    assert len((tmp_path / "run" / "metrics" / "metrics.jsonl").read_text().splitlines()) == 4
