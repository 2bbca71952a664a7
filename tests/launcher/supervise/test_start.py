from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from launcher import run_dir
from launcher.run_dir import RunDir
from launcher.submit import local
from launcher.supervise.others import lead
from launcher.supervise.start import Ending, start
from launcher.supervise.stop_requests import StopRequests

Stand = Callable[[str], None]


def started(run: RunDir, **more: Any) -> Ending:
    lock = run_dir.lock(run)
    given = {"quiet_stdout": True, "export": None, "on_look": lambda: None, **more}
    try:
        with lead(run) as others:
            return start(run, StopRequests(run=run), lock=lock, others=others, **given)
    finally:
        os.close(lock)


def test_a_good_end_is_code_0(frozen: Callable[..., RunDir], worker: Stand) -> None:
    run = frozen()
    worker("Heart(run.heartbeats, rank=1).beat('stepping', 7)")
    ending = started(run)
    assert (ending.code, ending.hang, ending.world_size) == (0, None, 2)
    assert [(beat.rank, beat.step) for beat in ending.beats] == [(1, 7)]
    assert [event["event"] for event in run.events()] == ["created", "launched"]


def test_what_an_earlier_start_left_is_forgotten(frozen: Callable[..., RunDir], worker: Stand) -> None:
    run = frozen()
    worker(
        "write_error(run, rank=0, host='h', error=ValueError('x'), frame=None, trace='t')\n"
        "Heart(run.heartbeats, rank=1)"
    )
    started(run)
    worker("print('fine', file=sys.stderr)")
    ending = started(run)
    assert ending.beats == ()
    assert not list(run.errors.glob("rank_*"))
    assert (run.logs / "stderr.log").read_bytes()[ending.log_from :] == b"fine\n"


def test_a_hang_is_seen_named_and_ended(frozen: Callable[..., RunDir], worker: Stand) -> None:
    run = frozen("supervise.step_timeout_s=1")
    worker(
        "Heart(run.heartbeats, rank=0).beat('stepping', 4)\n"
        "child = os.fork()\n"
        "if child == 0: Heart(run.heartbeats, rank=1).beat('stepping', 3)\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nwhile True: time.sleep(1)\n"
    )
    ending = started(run)
    assert ending.code != 0
    assert ending.hang is not None
    assert ending.hang.stall.key == "supervise.step_timeout_s"
    assert (ending.hang.culprit.rank, ending.hang.stall.limit_s) == (1, 1)
    for beat in ending.beats:
        with pytest.raises(ProcessLookupError):
            os.kill(beat.pid, 0)


def test_ranks_that_have_ended_do_not_hang(frozen: Callable[..., RunDir], worker: Stand) -> None:
    run = frozen("supervise.step_timeout_s=1")
    worker(
        "child = os.fork()\nHeart(run.heartbeats, rank=child == 0).beat('stepping', 3)\n"
        "if child == 0: sys.exit(0)\ntime.sleep(4)\nsys.exit(7)\n"  # as torchrun, slow to tell of a dead rank
    )
    ending = started(run)
    assert (ending.code, ending.hang) == (7, None)


def test_a_look_comes_while_the_workers_run(frozen: Callable[..., RunDir], worker: Stand) -> None:
    run = frozen("supervise.step_timeout_s=1")
    worker("while not run.stop_file.exists(): time.sleep(0.01)")
    assert started(run, on_look=run.stop_file.touch).code == 0


def test_workers_know_their_launcher_and_gpus_their_recorder(
    frozen: Callable[..., RunDir], worker: Stand
) -> None:
    run = frozen()
    worker(
        f"assert os.environ['{local.LAUNCHER_PID}'] == str(os.getppid())\n"
        "assert 'TORCH_NCCL_DUMP_ON_TIMEOUT' not in os.environ"
    )
    assert started(run).code == 0
    config = run.config_file.read_text()
    run.config_file.write_text(config.replace("device: cpu", "device: cuda"))
    worker("assert os.environ['TORCH_NCCL_DEBUG_INFO_TEMP_FILE'] == str(run.logs / 'nccl_trace_rank_')")
    assert started(run).code == 0
