"""The whole way on a real Slurm of one machine: `submit`, a warning, a lost node, a crash loop, a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import heartbeat

pytestmark = pytest.mark.usefixtures("slurm")

PATIENCE_S = 300  # a bound for a machine that does other things as well, not an expectation
PLACE = ("submit=slurm", "submit.sbatch.time=20", "cluster.num_nodes=2", "cluster.gpus_per_node=1")
SMALL = (
    *("monitor=none", "data.max_bytes=200000", "training.sequence_length=32", "training.global_batch_size=8"),
    "training.learning_rate=1e-3",
)


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def events(run: Path) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def names(run: Path) -> list[str]:
    return [event["event"] for event in events(run)]


def job_of(run: Path) -> str:
    return str(next(event["job"] for event in events(run) if event["event"] == "submitted"))


def state_of(job: str) -> str:
    told = slurm_says("scontrol", "-o", "show", "job", job)
    return next(word for word in told.split() if word.startswith("JobState=")).partition("=")[2]


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["step"]: row["loss"] for row in rows}


def log(run: Path) -> str:
    file = run / "logs" / "slurm.log"
    return file.read_text() if file.exists() else ""


def until(is_so: Callable[[], bool], *, run: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.2)


def ended(job: str) -> bool:
    return state_of(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def submit(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Queue a run and return how the verb ended; what is still queued at the end is cancelled."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs: list[Path] = []

    def queue(run: Path, *words: str) -> Any:
        runs.append(run)
        quoted = str(run).replace("\\", "\\\\").replace("'", "\\'")
        return call("submit", *PLACE, *SMALL, *words, f"run_dir='{quoted}'")

    yield queue
    for run in runs:
        for event in events(run):
            if event["event"] == "submitted" and not ended(event["job"]):
                subprocess.run(["scancel", event["job"]], check=True)


@pytest.fixture
def limited(submit: Callable[..., Any], tmp_path: Path) -> tuple[Path, str]:
    """A run without an end and with a real time limit, begun before anything else that its test waits for."""
    run = tmp_path / "limited"
    words = ("strategy=fake", "training.num_steps=10000000", "cluster.num_nodes=1")
    outcome = submit(run, *words, "submit.sbatch.time=2", "submit.signal_s=90")
    assert outcome.code == 0, outcome.err
    return run, job_of(run)


def test_two_nodes_train_in_a_folder_of_any_name_and_the_verbs_tell_of_it(
    submit: Callable[..., Any], call: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / 'it\'s 100%j "quoted" $HOME\nand more'
    outcome = submit(run, "strategy=accelerate", "training.num_steps=6", "submit.wait=true")
    assert outcome.code == 0, outcome.err + log(run)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert "could not be ordered" not in log(run)
    started = next(event for event in events(run) if event["event"] == "started")
    assert len(started["hosts"]) in (1, 2)  # one name only where nodes may not have names of their own
    assert call("logs", "-f", str(run)).out.count("finished at step 6") == 1
    told = call("status", str(run), "--json").json
    assert told["state"] == "finished"
    assert told["jobs"][job_of(run)] == {"state": "COMPLETED", "restarts": 0}
    again = call("submit", str(run))
    assert again.code == 2
    assert "is finished, there is nothing to submit" in again.err


def test_a_warned_run_saves_is_requeued_and_goes_on_to_the_last_bit(
    submit: Callable[..., Any], tmp_path: Path
) -> None:
    straight, warned = tmp_path / "straight", tmp_path / "warned"
    words = ("strategy=accelerate", "training.num_steps=150")
    assert submit(straight, *words, "submit.wait=true").code == 0, log(straight)
    assert submit(warned, *words).code == 0
    job = job_of(warned)
    until(lambda: len(losses(warned)) > 2, run=warned)
    slurm_says("scancel", "--batch", "--signal=USR1", job)
    until(lambda: any(event["event"] == "stopped" for event in events(warned)), run=warned)
    reached = max(losses(warned))
    assert 2 < reached < 150, "the warning came too late to mean anything"
    until(lambda: ended(job), run=warned)
    assert state_of(job) == "COMPLETED", log(warned)
    assert [event["step"] for event in events(warned) if event["event"] == "resumed"] == [reached]
    assert losses(warned) == losses(straight)
    assert "failed" not in names(warned)
    assert not (warned / "stop").exists()


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    submit: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("strategy=fake", "training.num_steps=10000000", "checkpoint.interval=20")
    assert submit(run, *words).code == 0
    job = job_of(run)
    until(lambda: any(event["event"] == "checkpoint" for event in events(run)), run=run)
    hosts = slurm_says("squeue", "-h", "-j", job, "-o", "%N").strip()
    lost = slurm_says("scontrol", "show", "hostnames", hosts).split()[1]
    slurm_says("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        until(lambda: any(event["event"] == "resumed" for event in events(run)), run=run)
        second = slurm_says("squeue", "-h", "-j", job, "-o", "%N").strip()
        assert lost not in slurm_says("scontrol", "show", "hostnames", second).split()
    finally:
        slurm_says("scontrol", "update", f"nodename={lost}", "state=resume")
    resumed = next(event for event in events(run) if event["event"] == "resumed")
    assert resumed["step"] % 20 == 0
    named = next(event for event in events(run) if event["event"] == "failed")
    assert (named["cause"], named["host"], named["exit_code"]) == ("lost_node", lost, 12)


def test_a_crash_loop_is_told_and_stops_at_its_bound_and_a_time_limit_does_not_count_as_one(
    submit: Callable[..., Any],
    limited: tuple[Path, str],
    call: Callable[..., Any],
    webhook: Any,
    tmp_path: Path,
) -> None:
    run, wrapper = tmp_path / "crashing", tmp_path / "wrapper"
    fails_first = 'case "${SLURM_RESTART_COUNT:-0} $*" in (0*torch.distributed.run*) exit 1;; esac; exec "$@"'
    wrapper.write_text(f"#!/bin/sh\n{fails_first}\n")
    wrapper.chmod(0o755)
    words = ("strategy=fake", "training.num_steps=10000000", "submit.max_restarts=1")
    place = ("cluster.num_nodes=1", "cluster.gpus_per_node=2", f"submit.prefix=[{wrapper}]")
    assert submit(run, *words, *place).code == 0
    job = job_of(run)
    until(lambda: (beat := heartbeat.read(run / "heartbeats", 1)) and beat.step > 0, run=run)
    os.kill(heartbeat.read(run / "heartbeats", 1).pid, signal.SIGKILL)
    until(lambda: ended(job), run=run)
    assert state_of(job) == "FAILED"
    assert log(run).count("requeued") == 1
    assert "2 starts from the same checkpoint (none) have brought no newer one" in log(run)
    told = [event for event in events(run) if event["event"] in ("failed", "restarting")]
    assert [event["event"] for event in told] == ["failed", "restarting", "failed"]
    first, _, second = told
    assert (first["cause"], first["exit_code"], first["step"]) == ("unknown", 9, 0)
    assert (second["cause"], second["exit_code"], second["rank"]) == ("lost_rank", 12, 1)
    assert f"rank 1 on {second['host']} was killed by SIGKILL" in second["message"]
    assert second["step"] > 0
    assert (webhook.told()["unknown"], webhook.told()["lost_rank"]) == (1, 1)

    run, job = limited
    until(lambda: any(event["event"] == "resumed" for event in events(run)), run=run)
    assert call("status", str(run), "--json").json["jobs"][job]["restarts"] >= 1
    until(lambda: state_of(job) == "RUNNING", run=run)
    assert "leaves after this step with a checkpoint" in call("cancel", str(run)).out
    until(lambda: ended(job), run=run)
    assert state_of(job) == "COMPLETED", log(run)
    assert "stopped on request, with a checkpoint" in log(run)
    assert "failed" not in names(run)


def test_a_sweep_drops_what_cannot_be_trains_the_rest_and_ranks_it(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "it's 100%j\nof a sweep"
    quoted = str(folder).replace("'", "\\'")
    points = (
        "cluster.num_nodes=1,2",
        "plan.micro_batch_size=1,2,3",
        "cluster.gpus_per_node=1",
        "strategy=fake",
    )
    how = (
        "submit=slurm",
        "submit.sbatch.time=20",
        "sweep.steps=12",
        "sweep.max_parallel=3",
        "submit.wait=true",
    )
    try:
        outcome = call("sweep", *SMALL, *points, *how, f"run_dir='{quoted}'")
    finally:
        call("cancel", str(folder), "--now")
    assert outcome.code == 0, outcome.err
    assert "4 points to try, 2 dropped" in outcome.out and "fastest   0" in outcome.out
    told = call("sweep", str(folder), "--json").json
    assert [point["state"] for point in told["points"]] == ["finished"] * 4, outcome.out
    assert sorted(point["num_nodes"] for point in told["points"]) == [1, 1, 2, 2]
    assert [found["exit_code"] for found in told["dropped"]] == [3, 3]
    assert told["is_over"] and told["winner"] == told["points"][0]["name"]
    runs = [folder / name for name in sorted(point["name"] for point in told["points"])]
    assert [len(log(run)) > 0 for run in runs] == [True] * 4
    ended = next(event["time"] for event in events(runs[0]) if event["event"] == "finished")
    begun = next(event["time"] for event in events(runs[3]) if event["event"] == "started")
    assert begun > ended, "no more than three side by side"
    best = call("best", str(folder), "--json").json["command"]
    assert best[:2] == ["meshwright", "submit"] and "submit=slurm" in best


def test_a_node_that_fails_its_preflight_is_left_out_until_too_few_are_left(
    submit: Callable[..., Any], tmp_path: Path
) -> None:
    left, none_left = tmp_path / "left", tmp_path / "none_left"
    wrapper = tmp_path / "wrapper"
    sick = 'case $SLURMD_NODENAME in (node0|node3) TMPDIR=/nowhere; export TMPDIR;; esac; exec "$@"'
    wrapper.write_text(f"#!/bin/sh\n{sick}\n")
    wrapper.chmod(0o755)
    words = ("strategy=fake", "training.num_steps=3", "submit.preflight=true", f"submit.prefix=[{wrapper}]")
    # The nodes share this machine's processors: how fast one is says nothing.
    words = (*words, "preflight.min_product=0", "preflight.min_bandwidth=0")
    assert submit(none_left, *words, "submit.sbatch.exclude='node[1-2]'").code == 0
    assert submit(left, *words, "submit.sbatch.exclude=node3").code == 0  # so node0 and node1, of one switch
    job = job_of(left)
    until(lambda: ended(job), run=left)
    assert state_of(job) == "COMPLETED", log(left)
    assert sorted(losses(left)) == [1, 2, 3]
    assert "FAIL  node0" in log(left)
    assert "the folder for temporary files (/nowhere) cannot be written" in log(left)
    assert "requeued without node3,node0" in log(left)
    report = json.loads((left / "preflight.json").read_text())
    assert report["passed"] and {node["host"] for node in report["nodes"]} == {"node1", "node2"}

    job = job_of(none_left)
    until(lambda: ended(job), run=none_left)
    assert "ExitCode=15:0" in slurm_says("scontrol", "-o", "show", "job", job)
    assert "node0,node3 only 0 usable nodes are left in partition gpu and the run needs 2" in log(none_left)
    assert json.loads((none_left / "preflight.json").read_text())["failed"] == ["node0", "node3"]


def test_plans_are_made_for_what_slurm_has(call: Callable[..., Any]) -> None:
    told = call("plan", "cluster=slurm", "model=llama3_8b", "strategy=megatron", "--json")
    assert told.code == 0, told.err
    cluster = told.json["inputs"]["cluster"]
    assert (cluster["num_nodes"], cluster["gpus_per_node"], cluster["partition"]) == (4, 8, "gpu")
