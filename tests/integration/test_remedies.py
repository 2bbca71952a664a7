"""Real runs that run out of memory, of devices and of good losses, and go on with the same global batch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import chaos
from benchmarks.chaos import Fault
from launcher import heartbeat
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir

SMALL = ("monitor=none", "data.max_bytes=300000", "training.precision=fp32", "evaluation.num_sequences=8")
# One micro-batch of it needs some gigabytes for a second or two: far more than a process that starts does.
LARGE = (
    *(*SMALL, "strategy=accelerate", "cluster.gpus_per_node=1", "model.num_layers=6", "model.hidden_size=96"),
    *(
        "model.ffn_hidden_size=256",
        "model.num_attention_heads=6",
        "model.num_kv_heads=2",
        "data.max_bytes=3000000",
    ),
    *("training.sequence_length=256", "training.global_batch_size=96", "training.num_steps=3"),
    *("plan.micro_batch_size=96", "plan.recompute=none", "supervise.on_out_of_memory=[halve_micro_batch]"),
)
ELASTIC = (
    *(
        *SMALL,
        "strategy=accelerate",
        "model.num_layers=2",
        "training.sequence_length=64",
    ),
    *(
        "training.global_batch_size=8",
        "training.num_steps=40",
        "checkpoint.interval=5",
        "supervise.backoff_s=0",
    ),
)


def losses(run: RunDir) -> list[float]:
    return [loss for _, _, loss in chaos.trajectory(run)]


class Ceiling(threading.Thread):
    """Allow each start of the one worker so many bytes beyond what it has when it begins to build its model."""

    def __init__(self, run: RunDir, launcher: subprocess.Popen[Any], *, more_bytes: int) -> None:
        super().__init__(daemon=True)
        self._run, self._launcher, self._more = run, launcher, more_bytes
        self.limited: list[int] = []

    def run(self) -> None:
        while self._launcher.poll() is None:
            beat = heartbeat.read(self._run.heartbeats, 0)
            if beat is not None and beat.pid not in self.limited:
                held = psutil.Process(beat.pid).memory_info().vms
                resource.prlimit(beat.pid, resource.RLIMIT_AS, (held + self._more, resource.RLIM_INFINITY))
                self.limited.append(beat.pid)
            time.sleep(0.005)


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path: Path) -> None:
    whole = chaos.train(LARGE, [], path=tmp_path / "whole")
    assert whole.code == 0, whole.err
    needed = read(whole.run.metrics_file)[-1]["memory_gib"] * 2**30
    run = RunDir(path=tmp_path / "limited")
    command = [sys.executable, "-m", "launcher", "train", *LARGE, f"run_dir={run.path}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launcher:
        ceiling = Ceiling(run, launcher, more_bytes=round(0.75 * needed))
        ceiling.start()
        _, err = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, err
    assert len(ceiling.limited) >= 2
    assert "out of memory" in err
    plan = run.plan()
    assert plan.micro_batch_size < whole.run.plan().micro_batch_size == 96
    assert plan.global_batch_size == 96
    assert [samples for _, samples, _ in chaos.trajectory(run)] == [96, 192, 288]
    assert losses(run) == pytest.approx(losses(whole.run), rel=1e-5)
    replanned = [event for event in run.events() if event["event"] == "replanned"]
    assert {(event["reason"], event["remedy"]) for event in replanned} == {
        ("out_of_memory", "halve_micro_batch")
    }


def test_fewer_ranks_go_on_until_the_lost_ones_are_back(tmp_path: Path) -> None:
    # One process has the same global batches, and starts soonest.
    whole = chaos.train([*ELASTIC, "cluster.gpus_per_node=1"], [], path=tmp_path / "whole")
    assert whole.code == 0, whole.err
    run = RunDir(path=tmp_path / "elastic")
    health = tmp_path / "health.py"
    # Two devices are lost from the 7th step to the 20th.
    health.write_text(
        "import pathlib, sys\nmetrics = pathlib.Path(sys.argv[1], 'metrics', 'metrics.jsonl')\n"
        "steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0\n"
        "print(2 if 7 <= steps < 20 else 4)\n"
    )
    words = [
        *(*ELASTIC, "cluster.gpus_per_node=4", "supervise.elastic=true", "supervise.health_interval_s=0.2"),
        f"supervise.health_command='{sys.executable} {health} {run.path}'",
    ]
    lost = Fault(kind="kill", at_step=8, delay_s=0.0, draw=0.9)
    outcome = chaos.train(words, [lost], path=run.path)
    assert outcome.code == 0, outcome.err
    replanned = [event for event in run.events() if event["event"] == "replanned"]
    assert [(event["before"]["dp"], event["after"]["dp"]) for event in replanned] == [(4, 2), (2, 4)]
    assert [samples for _, samples, _ in chaos.trajectory(run)] == list(range(8, 321, 8))
    assert losses(run) == pytest.approx(losses(whole.run), rel=1e-5)
    assert losses(run) != losses(whole.run)


SPOILER = """
import zlib
from dataclasses import replace
import strategies.fake
def spoil(step):
    def spoiled(self, batches, *, learning_rate):
        result = step(self, batches, learning_rate=learning_rate)
        return replace(result, loss=float("nan")) if zlib.crc32(batches[0].tobytes()) == {bad} else result
    return spoiled
strategies.fake.FakeStrategy.train_step = spoil(strategies.fake.FakeStrategy.train_step)
"""


def test_a_batch_without_a_loss_is_left_out(shell: Callable[..., Any], tmp_path: Path) -> None:
    run = RunDir(path=tmp_path / "run")
    words = [
        *(
            *SMALL,
            "strategy=fake",
            "cluster.gpus_per_node=1",
            "training.sequence_length=32",
            "checkpoint.interval=2",
        ),
        *(
            "training.global_batch_size=8",
            "training.num_steps=6",
            "plan.micro_batch_size=8",
            "plan.tp=1",
            "plan.pp=1",
        ),
        "supervise.on_bad_loss=[skip_batch]",
    ]
    (tmp_path / "sitecustomize.py").write_text(
        SPOILER.format(bad=_checksum_of_batch(words, tmp_path, number=3))
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    outcome = shell("train", *words, f"run_dir={run.path}", PYTHONPATH=path)
    assert outcome.code == 0, outcome.err
    assert "the loss of step 4 is nan" in outcome.err
    assert "starting again with data.skip_samples=[24] from step_0000000002" in outcome.err
    assert [samples for _, samples, _ in chaos.trajectory(run)] == [8, 16, 24, 40, 48, 56]
    assert run.job().data.skip_samples == (24,)


def _checksum_of_batch(words: list[str], folder: Path, *, number: int) -> int:
    """Which global batch the spoiler shall not like."""
    import zlib

    from launcher import compose, freeze
    from launcher.data.loader import BatchLoader
    from launcher.output import Output

    (job,) = compose.jobs([*words, f"run_dir={folder / 'frozen'}"])
    run = freeze.freeze(job, Output(as_json=True))
    with BatchLoader(
        run.dataset(),
        split="train",
        sequence_length=32,
        global_batch_size=8,
        micro_batch_size=8,
        num_microbatches=1,
        dp=1,
        dp_rank=0,
        seed=job.training.seed,
        shuffle=job.data.shuffle,
        num_workers=0,
        start_sample=8 * number,
    ) as loader:
        return zlib.crc32(loader.next()[0].tobytes())
