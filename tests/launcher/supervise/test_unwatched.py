"""What is told of a start that only Slurm's script or torchrun saw end: once, by its first cause."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import BadLossError
from launcher.heartbeat import Heart
from launcher.run_dir import RunDir, write_error
from launcher.supervise import unwatched

Bare = Callable[..., None]
KILLED = "Root Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)\n"
LOST = RuntimeError("Connection closed by peer [127.0.0.1]:21918")


def died(run: RunDir, error: Exception, *, rank: int = 0) -> None:
    write_error(run, rank=rank, host="h", error=error, frame="train.py:3", trace="")


def failures(run: RunDir) -> list[tuple[Any, ...]]:
    told = [event for event in run.events() if event["event"] == "failed"]
    return [(event["cause"], event["rank"], event["step"]) for event in told]


@pytest.fixture
def run(frozen: Callable[..., RunDir]) -> RunDir:
    return frozen()


@pytest.fixture
def bare(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Bare:
    """Make this process a rank of a torchrun that starts it again so often."""

    def set_variables(*, restart: int = 0, restarts: int = 0) -> None:
        for name in ("MESHWRIGHT_LAUNCHER_PID", "MESHWRIGHT_HOSTS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))

    set_variables()
    return set_variables


# ---- Slurm --------------------------------------------------------------------------------------------------------


def test_a_job_tells_which_rank_a_signal_ended_in_its_own_part_of_the_log(
    run: RunDir, webhook: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run.logs / "slurm.log"
    log.write_text(f"{KILLED.replace(': 1 (', ': 0 (')}of an earlier start\n")
    before = log.stat().st_size
    log.write_text(log.read_text() + KILLED)
    monkeypatch.setattr("socket.gethostname", lambda: "node3")
    Heart(run.heartbeats, rank=1).beat("stepping", 6)
    monkeypatch.setattr("socket.gethostname", lambda: "node0")
    died(run, LOST)
    for _ in range(2):  # two starts of one job
        assert unwatched.main([str(run.path), "1", str(log), str(before)]) == 0
    assert failures(run) == [("lost_rank", 1, 6)] * 2
    assert "rank 1 on node3 was killed by SIGKILL" in capsys.readouterr().err
    assert webhook.told() == {"lost_rank": 1}


@pytest.mark.parametrize(
    "line",
    [
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of your processes may have been killed",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
    ],
)
def test_a_kill_is_for_memory_where_slurm_says_so(run: RunDir, line: str) -> None:
    (run.logs / "slurm.log").write_text(f"{KILLED}{line}\n")
    unwatched.main([str(run.path), "1", str(run.logs / "slurm.log"), "0"])
    assert failures(run) == [("out_of_memory", 1, 0)]


def test_an_error_file_is_enough_where_the_log_cannot_be_seen(run: RunDir) -> None:
    died(run, BadLossError("the loss of step 3 is nan"), rank=1)
    unwatched.main([str(run.path), "1", "/not/in/this/container.log", "999"])
    assert failures(run) == [("bad_loss", 1, 0)]


# ---- a bare torchrun ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["MESHWRIGHT_LAUNCHER_PID", "MESHWRIGHT_HOSTS"])
def test_whoever_has_a_launcher_or_a_job_script_leaves_it_to_them(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    assert unwatched.is_ours()
    monkeypatch.setenv(variable, "1")
    assert not unwatched.is_ours()


def test_without_torchrun_nobody_else_is_told(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not unwatched.is_ours()


def test_ranks_that_raise_at_once_tell_once(run: RunDir, bare: Bare, webhook: Any) -> None:
    run.log_event("started", step=0)
    together = threading.Barrier(6)

    def end(rank: int) -> None:
        together.wait(60)
        died(run, BadLossError("the loss of step 3 is nan"), rank=rank)
        unwatched.tell(run)

    with ThreadPoolExecutor(6) as ranks:
        list(ranks.map(end, range(6)))
    assert [cause for cause, _, _ in failures(run)] == ["bad_loss"]
    assert webhook.told() == {"bad_loss": 1}


def test_the_cause_is_told_and_not_who_lost_a_peer_by_it(run: RunDir, bare: Bare) -> None:
    Heart(run.heartbeats, rank=1).beat("stepping", 4)
    died(run, LOST, rank=0)
    died(run, BadLossError("the loss of step 5 is nan"), rank=1)  # and was ended before it could tell
    unwatched.tell(run)
    assert failures(run) == [("bad_loss", 1, 4)]


def test_ranks_that_only_lost_a_peer_tell_that_and_that_torchrun_goes_on(run: RunDir, bare: Bare) -> None:
    bare(restart=1, restarts=2)
    died(run, LOST)
    for _ in range(2):
        unwatched.tell(run)
    assert [event["event"] for event in run.events()] == ["created", "failed", "restarting"]
    assert failures(run) == [("lost_rank", 0, 0)]


def test_each_start_has_its_own_failure(run: RunDir, bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    died(run, LOST)
    unwatched.tell(run)
    run.log_event("started", step=0)
    unwatched.tell(run)
    assert len(failures(run)) == 2
    begun = time.time() - 0.9  # as the system tells of a process that began just now
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(create_time=lambda: begun))
    unwatched.tell(run)  # fails before it has started
    assert len(failures(run)) == 3


def test_a_restart_tells_of_ranks_that_left_no_word(
    run: RunDir, bare: Bare, monkeypatch: pytest.MonkeyPatch, webhook: Any
) -> None:
    run.log_event("started", step=0)
    unwatched.tell_restart(run)
    assert failures(run) == []  # a first start: whoever ended the one before may have meant it
    bare(restart=1, restarts=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    unwatched.tell_restart(run)
    assert failures(run) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(2):
        unwatched.tell_restart(run)
    assert failures(run) == [("lost_rank", None, None)]
    assert webhook.told() == {"lost_rank": 1}


def test_what_goes_wrong_with_telling_is_one_line(
    run: RunDir, bare: Bare, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config_file.write_text("no: configuration")
    died(run, LOST)
    unwatched.tell(run)
    assert capsys.readouterr().err.startswith("meshwright: the failure could not be told: unknown key")
    unwatched.tell(RunDir(path=Path(os.devnull)))
    assert "Not a directory" in capsys.readouterr().err
