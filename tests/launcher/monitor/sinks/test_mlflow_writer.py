"""MLflow in processes of its own, because its packages lie apart; read back with its own client."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Starts of a run as the worker makes them: (step to resume at, last step, loss, how it ends), and the runs' ids.
STARTS = """
import json, os, sys
from pathlib import Path
from launcher.monitor.config import MonitorConfig
from launcher.monitor.metrics import MetricsFile, StepMetrics, truncate_after
from launcher.monitor.sinks.writers import About, open_writers

run = Path(sys.argv[1])
file, ids = run / "metrics" / "metrics.jsonl", []
config = MonitorConfig(tensorboard=False, wandb=False, mlflow=True)
about = About(directory=run / "metrics", settings={"training": {"seed": 3}}, plan={"dp": 2})
for resume_at, last, loss, how in json.loads(sys.argv[2]):
    history = truncate_after(file, step=resume_at)
    kept, writers = MetricsFile(file), open_writers(config, about=about, history=history)
    assert writers.names == ("MLflow",), writers.names
    for step in range(resume_at + 1, last + 1):
        metrics = StepMetrics(step=step, time=1.7e9 + step, consumed_samples=8 * step, loss=loss, grad_norm=1.0,
            learning_rate=1e-3, step_time_s=0.5, tokens_per_s_per_gpu=1.0, memory_gib=1.0, straggler_score={"0": 1.0})
        kept.write(metrics)
        writers.write(metrics)
    writers.flush()
    sink = writers._writers["MLflow"].writer
    ids.append(sink._run_id)
    if how == "noted":
        sink._client.set_tag(sink._run_id, "mlflow.note.content", "look here")
    print(json.dumps(ids), flush=True)
    if how == "killed":
        os._exit(9)
    writers.close()
"""


@pytest.fixture
def start(tmp_path: Path, mlflow_environment: dict[str, str]) -> Callable[..., list[str]]:
    def run(*starts: tuple[int, int, float, str]) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", STARTS, str(tmp_path / "my run"), json.dumps(starts)],
            env={**os.environ, **mlflow_environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (9 if starts[-1][-1] == "killed" else 0), done.stderr
        ids: list[str] = json.loads(done.stdout.splitlines()[-1])
        return ids

    return run


def losses(run: dict[str, Any]) -> dict[int, float]:
    found = [(step, value) for tag, step, value in run["points"] if tag == "train/loss"]
    assert len(dict(found)) == len(found), "a step twice"
    return dict(found)


def test_a_run_has_every_step_once_over_all_starts(
    tmp_path: Path, start: Callable[..., list[str]], mlflow_reader: Callable[[Path], list[Any]]
) -> None:
    first, stopped, taken_back, _ = start(
        (0, 4, 3.0, "noted"),
        (4, 6, 2.0, "closed"),  # stopped and resumed: the same run goes on
        (5, 7, 1.0, "closed"),  # a step was taken back
        (7, 400, 4.0, "killed"),  # whatever of it was told
    )
    assert stopped == first != taken_back
    (last,) = start((8, 9, 5.0, "closed"))
    (run,) = mlflow_reader(tmp_path / "my run" / "metrics" / "mlflow")
    assert (run["id"], run["name"], run["status"]) == (last, "my run", "FINISHED")
    assert run["params"] == {"training.seed": "3", "plan.dp": "2"}
    assert run["tags"]["mlflow.note.content"] == "look here"
    assert losses(run) == {1: 3, 2: 3, 3: 3, 4: 3, 5: 2, 6: 1, 7: 1, 8: 4, 9: 5}
    assert ["perf/straggler_score/0", 4, 1.0] in run["points"]


def test_a_place_that_does_not_know_the_run_is_told_it_anew(
    tmp_path: Path, start: Callable[..., list[str]], mlflow_reader: Callable[[Path], list[Any]]
) -> None:
    start((0, 2, 3.0, "closed"))
    folder = tmp_path / "my run" / "metrics" / "mlflow"
    shutil.rmtree(folder)
    (last,) = start((2, 3, 1.0, "closed"))
    (run,) = mlflow_reader(folder)
    assert (run["id"], losses(run)) == (last, {1: 3, 2: 3, 3: 1})


def test_no_start_waits_for_a_server_that_never_answers(
    tmp_path: Path, mlflow_environment: dict[str, str]
) -> None:
    starting = STARTS.partition("    for step in")[0] + "    os._exit(0)"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        subprocess.run(
            [sys.executable, "-c", starting, str(tmp_path / "run"), json.dumps([(0, 1, 3.0, "closed")])],
            env={**os.environ, **mlflow_environment, "MLFLOW_TRACKING_URI": place},
            timeout=100,  # of the 120 s that MLflow gives to the first of its tries
            check=True,
        )


def test_a_server_that_is_not_there_is_one_line(
    tmp_path: Path, mlflow_environment: dict[str, str], shell: Callable[..., Any]
) -> None:
    words = ("strategy=fake", "cluster.gpus_per_node=1", "training.num_steps=2", "data.max_bytes=100000")
    small = ("model.num_layers=1", "training.sequence_length=16", "training.global_batch_size=2")
    outcome = shell(
        *("train", *words, *small, "monitor=mlflow", "monitor.tensorboard=false", "monitor.wandb=false"),
        f"run_dir={tmp_path / 'run'}",
        **mlflow_environment,
        MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    assert outcome.code == 0, outcome.err
    assert len([line for line in outcome.out.splitlines() if "MLflow is off" in line]) == 1, outcome.out
    assert "secret" not in outcome.out + outcome.err
    assert len((tmp_path / "run" / "metrics" / "metrics.jsonl").read_text().splitlines()) == 2
