from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.heartbeat import Beat, read_all
from launcher.run_dir import RunDir
from launcher.submit.local import LAUNCHER_PID
from launcher.supervise import processes

RANK = """
import faulthandler, signal, sys, time
from pathlib import Path
from launcher.heartbeat import Heart
run, rank = Path(sys.argv[1]), int(sys.argv[2])
stacks = (run / "logs" / f"stacks_rank_{rank:05d}.txt").open("a")
faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
def waits_for_its_data():
    while True:
        time.sleep(0.01)
Heart(run / "heartbeats", rank=rank)
waits_for_its_data()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(path=tmp_path)
    made.logs.mkdir()
    return made


@contextmanager
def ranks(run: RunDir, *, number: int, launcher: int, first: int = 0) -> Iterator[list[Beat]]:
    command = [sys.executable, "-c", RANK, str(run.path)]
    environment = {**os.environ, LAUNCHER_PID: str(launcher)}
    started = [
        subprocess.Popen([*command, str(rank)], env=environment, start_new_session=True)
        for rank in range(first, first + number)
    ]
    try:
        while len(beats := list(read_all(run.heartbeats, world_size=first + number))[first:]) < number:
            assert all(process.poll() is None for process in started)
            time.sleep(0.02)
        yield beats
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_ranks_tell_what_they_are_doing_even_when_they_are_stopped(run: RunDir) -> None:
    with ranks(run, number=2, launcher=os.getpid()) as beats:
        assert processes.stopped(beats) == []
        os.kill(beats[1].pid, signal.SIGSTOP)
        while processes.stopped(beats) != [1]:
            time.sleep(0.01)
        busy = processes.dump_stacks(run, beats)
    assert set(busy) == {0, 1}
    assert all(place.startswith("<string>:") for place in busy.values())
    for rank in range(2):
        assert "waits_for_its_data" in processes.stacks_file(run, rank).read_text()


def test_a_rank_inside_of_pytorch_is_not_busy(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    file = processes.stacks_file(run, 0)
    beat = Beat(rank=0, host="h", pid=os.getpid(), phase="stepping", step=1, count=1)

    def dumps(pid: int, number: int) -> None:
        with file.open("a") as stacks:
            stacks.write(
                'Current thread 0x1 (most recent call first):\n  File "/x/torch/distributed/d.py", line 9 in w\n'
            )

    monkeypatch.setattr(os, "kill", dumps)
    assert processes.dump_stacks(run, [beat]) == {}


def test_all_that_this_launcher_started_for_the_run_ends(run: RunDir, tmp_path: Path) -> None:
    with ranks(run, number=2, launcher=os.getpid()) as beats:
        processes.end(RunDir(path=tmp_path / "another"))
        assert all(_lives(beat.pid) for beat in beats)
        os.kill(beats[0].pid, signal.SIGSTOP)
        processes.end(run)
        assert not any(_lives(beat.pid) for beat in beats)


def test_workers_of_another_launcher_are_left_alone(run: RunDir) -> None:
    with ranks(run, number=1, launcher=os.getpid() + 1) as beats:
        processes.end(run)
        assert _lives(beats[0].pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_the_flight_recorder_is_asked_through_its_pipe(run: RunDir) -> None:
    pipe = run.logs / "nccl_pipe_rank_1.pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    processes.dump_flight_recorder(run, [0, 1])  # rank 0 has none
    assert os.read(reader, 8) == b"1"
    os.close(reader)
    processes.dump_flight_recorder(run, [1])  # nobody reads any more


def test_only_ranks_whose_launcher_is_gone_are_orphans(run: RunDir) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    with (
        ranks(run, number=1, launcher=os.getpid()) as (mine,),
        ranks(run, number=2, launcher=gone.pid, first=1) as orphans,
    ):
        processes.end_orphans(run)
        assert processes.gone(orphans) == [1, 2]
        assert processes.gone([mine]) == []
