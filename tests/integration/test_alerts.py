"""Each alert by a real cause in a real run, and once at a webhook that listens here."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = (
    *(
        "data.max_bytes=200000",
        "training.sequence_length=32",
        "model.num_layers=2",
        "training.global_batch_size=8",
    ),
    *(
        "monitor.tensorboard=false",
        "monitor.wandb=false",
        "monitor.sample_interval=2",
        "monitor.node_seconds=1",
    ),
)
ENDLESS = "training.num_steps=1000000"
# A crowded machine is slow now and then, which is another alert.
CALM = ("monitor.alerts.slowdown=0", "monitor.alerts.least_goodput=0")


@contextmanager
def training(run: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "launcher", "train", *SMALL, *words, f"run_dir={run}"]
    with (run.parent / f"{run.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for rank in workers(run):
                rank.kill()


def workers(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "launcher.training.worker" in words and str(run) in words and "torch.distributed.run" not in words:
            found.append(process)
    return sorted(found, key=lambda process: process.environ().get("RANK", "0"))


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a run leave, which may have ended or been started again by itself."""
    if process.poll() is None:
        process.terminate()
    process.wait(timeout=120)


def num_steps(run: Path) -> int:
    file = run / "metrics" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@contextmanager
def throttled(process: psutil.Process) -> Iterator[None]:
    """Let a process run for a fifth of the time only, as a GPU too hot or a busy neighbour would."""
    done = threading.Event()

    def throttle() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not done.is_set():
                process.suspend()
                time.sleep(0.04)
                process.resume()
                time.sleep(0.01)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def test_every_cause_of_a_run_with_two_ranks_is_told_once(tmp_path: Path, webhook: Any) -> None:
    run = tmp_path / "run"
    rules = (
        *("stalled_least_s=3", "stalled_factor=3", "checkpoint_age_s=1"),
        *("goodput_after_s=0", "least_goodput=0.99"),
    )
    words = (ENDLESS, "cluster.gpus_per_node=2", *(f"monitor.alerts.{rule}" for rule in rules))
    with training(run, *words) as process:
        wait_for(lambda: num_steps(run) > 60, "steps")
        # Starting took longer than the steps so far, and nothing is saved.
        wait_for(lambda: {"checkpoint_age", "low_goodput"} <= set(webhook.told()), "what start-up causes")
        slow = workers(run)[1]
        with throttled(slow):
            wait_for(lambda: {"straggler", "slowdown"} <= set(webhook.told()), "what a slow rank causes")
        slow.suspend()
        wait_for(lambda: "stalled" in webhook.told(), "what a stopped rank causes")
        slow.resume()
        before = num_steps(run)
        wait_for(lambda: num_steps(run) > before + 20, "steps after the stop")
        slow.kill()
        wait_for(lambda: "lost_rank" in webhook.told(), "what a killed rank causes")
        end(process)
        causes = {"checkpoint_age", "low_goodput", "straggler", "slowdown", "stalled", "lost_rank"}
        assert webhook.told() == dict.fromkeys(causes, 1)
    text = "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    assert "lost_rank" in text
    assert "secret-path" not in text + (tmp_path / "run.log").read_text()


def test_a_loss_that_is_no_number_is_told_once(tmp_path: Path, webhook: Any) -> None:
    words = ("cluster.gpus_per_node=1", "training.num_steps=50", "training.learning_rate=1e30")
    words += ("training.warmup_steps=0", "training.max_grad_norm=0", *CALM)
    with training(tmp_path / "run", *words) as process:
        wait_for(lambda: "bad_loss" in webhook.told(), "a loss that is no number")
        end(process)
        assert webhook.told() == {"bad_loss": 1}


def test_memory_that_is_refused_is_told_once(
    tmp_path: Path, webhook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every step asks the system for memory, instead of living on what it was given before.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    run = tmp_path / "run"
    with training(run, ENDLESS, "cluster.gpus_per_node=1", *CALM) as process:
        wait_for(lambda: num_steps(run) > 5, "steps")
        (worker,) = workers(run)
        worker.rlimit(resource.RLIMIT_AS, (worker.memory_info().vms, resource.RLIM_INFINITY))
        worker.rlimit(resource.RLIMIT_DATA, (2**20, resource.RLIM_INFINITY))
        wait_for(lambda: "out_of_memory" in webhook.told(), "memory that is refused")
        end(process)
        assert webhook.told() == {"out_of_memory": 1}
