from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from launcher import errors
from launcher.heartbeat import Beat
from launcher.run_dir import RunDir
from launcher.supervise.failure import Failure, explain, lost_node
from launcher.supervise.notes import Death
from launcher.supervise.others import Lost
from launcher.supervise.start import Ending, Hang
from launcher.supervise.watch import Culprit, Stall

KILLED = "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(path=tmp_path)
    made.logs.mkdir()
    made.errors.mkdir()
    (made.logs / "stderr.log").write_text("")
    return made


def died(run: RunDir, **fields: Any) -> None:
    record = {
        "time": 1.0,
        "rank": 0,
        "host": "h",
        "type": "ValueError",
        "message": "boom",
        "exit_code": 1,
        "frame": "train.py:3",
        "traceback": "t.txt",
    } | fields
    (run.errors / f"rank_{record['rank']:05d}.json").write_text(json.dumps(record))


def explained(run: RunDir, *, code: int = 1, world_size: int = 2, log_from: int = 0, **more: Any) -> Failure:
    log = run.logs / "stderr.log"
    return explain(
        run, Ending(code=code, world_size=world_size, log=log, log_from=log_from, beats=()), **more
    )


def test_a_foreign_exception_names_rank_host_frame_and_traceback(run: RunDir) -> None:
    died(run, rank=1)
    found = explained(run)
    assert type(found.error) is errors.TrainingError
    assert str(found.error) == "rank 1 on h failed at train.py:3: ValueError: boom; full traceback in t.txt"
    assert (found.rank, found.host, found.frame) == (1, "h", "train.py:3")


@pytest.mark.parametrize(
    ("fields", "cause", "kind"),
    [
        ({"type": "KeyError"}, "user_error", errors.TrainingError),
        ({"type": "NotImplementedError"}, "user_error", errors.TrainingError),
        ({"type": "RuntimeError", "message": "CUDA error: ECC"}, "unknown", errors.TrainingError),
        ({"type": "SomebodysError"}, "unknown", errors.TrainingError),
        (
            {"type": "OSError", "message": "[Errno 28] No space left on device"},
            "storage_full",
            errors.TrainingError,
        ),
        ({"type": "DataError", "exit_code": 4}, "user_error", errors.DataError),
        ({"type": "PlanError", "exit_code": 3}, "plan_impossible", errors.PlanError),
        ({"type": "EngineError", "exit_code": 7}, "user_error", errors.EngineError),
        ({"type": "CheckpointError", "exit_code": 6}, "corrupt_checkpoint", errors.CheckpointError),
        (
            {"type": "CheckpointError", "exit_code": 6, "message": "could not be written: File too large"},
            "storage_full",
            errors.CheckpointError,
        ),
        (
            {
                "type": "CheckpointError",
                "exit_code": 6,
                "message": "could not write checkpoint step 5 under /runs: Read-only file system",
            },
            "storage_full",
            errors.CheckpointError,
        ),
        ({"type": "BadLossError", "exit_code": 14}, "bad_loss", errors.BadLossError),
        ({"type": "DeviceMemoryError", "exit_code": 10}, "out_of_memory", errors.DeviceMemoryError),
        (
            {
                "type": "DistBackendError",
                "message": "Watchdog caught collective operation timeout: ALLREDUCE",
            },
            "collective_timeout",
            errors.HungError,
        ),
        ({"type": "RuntimeError", "message": "Connection reset by peer"}, "lost_rank", errors.LostRankError),
    ],
)
def test_each_end_has_its_cause_and_its_exit_code(
    run: RunDir, fields: dict[str, Any], cause: str, kind: type[errors.LauncherError]
) -> None:
    died(run, **fields)
    found = explained(run)
    assert (found.cause, type(found.error)) == (cause, kind)


@pytest.mark.parametrize(
    ("reason", "cause", "kind"),
    [
        ("[Errno 28] No space left on device", "storage_full", errors.CheckpointError),
        ("OutOfMemoryError: CUDA out of memory. Tried", "out_of_memory", errors.DeviceMemoryError),
        ("MemoryError", "out_of_memory", errors.DeviceMemoryError),
        ("RuntimeError: Connection reset by peer", "lost_rank", errors.LostRankError),
        ("RuntimeError: Timed out waiting 7200000ms", "collective_timeout", errors.HungError),
        ("RuntimeError: CUDA error: uncorrectable ECC error", "unknown", errors.CheckpointError),
        ("DistBackendError: NCCL error in: x.cpp:1", "unknown", errors.CheckpointError),
        ("[Errno 5] Input/output error", "unknown", errors.CheckpointError),
        ("[Errno 116] Stale file handle", "unknown", errors.CheckpointError),
        ("KeyError: 'weight'", "user_error", errors.CheckpointError),
    ],
)
@pytest.mark.parametrize(
    "sentence",
    [
        "checkpoint of step 5 could not be written under /r: {}; x",
        "the checkpoint under way was not finished: {}",
    ],
)
def test_a_save_may_die_of_more_than_a_full_disk(
    run: RunDir, sentence: str, reason: str, cause: str, kind: type[errors.LauncherError]
) -> None:
    died(run, type="CheckpointError", exit_code=6, message=sentence.format(reason))
    found = explained(run)
    assert (found.cause, type(found.error)) == (cause, kind)
    assert reason in str(found.error)


def test_our_own_sentence_stays_as_it_is(run: RunDir) -> None:
    died(run, exit_code=6, type="CheckpointError", message="none is good")
    assert str(explained(run).error) == "none is good"


def test_a_lost_connection_is_a_consequence_not_the_cause(run: RunDir) -> None:
    died(run, rank=0, time=1.0, message="Connection closed by peer [127.0.0.1]")
    died(run, rank=1, time=2.0, message="the real reason")
    assert "the real reason" in str(explained(run).error)


def test_a_message_that_merely_mentions_a_peer_is_a_cause(run: RunDir) -> None:
    died(run, rank=0, time=1.0, message="peer review of the data failed")
    died(run, rank=1, time=2.0, type="DistBackendError", message="NCCL error")
    assert "peer review" in str(explained(run).error)


def test_a_signal_is_read_from_the_summary(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(
        f"[1]:\n  time      : now\n  host      : h\n{KILLED}  error_file: <N/A>\n"
    )
    found = explained(run)
    assert (found.cause, found.rank, found.host) == ("lost_rank", 1, socket.gethostname())
    assert type(found.error) is errors.LostRankError
    assert "was killed by SIGKILL" in str(found.error)


def test_a_summary_is_read_whose_lines_srun_has_numbered(run: RunDir) -> None:
    numbered = KILLED.replace("  rank", "12:   rank").replace("  exitcode", "12:   exitcode")
    (run.logs / "stderr.log").write_text(numbered)
    assert explained(run).rank == 1


def test_a_kill_is_for_memory_where_the_kernel_says_so(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(KILLED)
    found = explained(run, out_of_memory_kills=1)
    assert (found.cause, found.rank) == ("out_of_memory", 1)
    assert type(found.error) is errors.DeviceMemoryError


def test_the_root_cause_is_read_not_what_it_caused(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(
        "Other Failures:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 76)\n"
        f"Root Cause (first observed failure):\n{KILLED}"
    )
    assert explained(run).rank == 1


def test_a_killed_rank_explains_the_connections_it_broke(run: RunDir) -> None:
    died(run, rank=0, message="Read error [127.0.0.1]:43159: Connection reset by peer.")
    (run.logs / "stderr.log").write_text(f"Root Cause (first observed failure):\n{KILLED}")
    assert explained(run).rank == 1


def test_the_killed_rank_is_found_when_its_victim_was_noticed_first(run: RunDir) -> None:
    died(run, rank=0, message="Connection closed by peer [127.0.0.1]:21918.")
    (run.logs / "stderr.log").write_text(
        f"Failures:\n{KILLED}  rank      : 2 (local_rank: 2)\n  exitcode  : -15 (pid: 78)\n"
        "Root Cause (first observed failure):\n  rank      : 0 (local_rank: 0)\n  exitcode  : 9 (pid: 76)\n"
    )
    assert explained(run).rank == 1


def test_a_killed_torchrun_is_no_rank(run: RunDir) -> None:
    found = explained(run, code=-9)
    assert (found.cause, found.rank) == ("lost_rank", None)
    assert "torchrun on" in str(found.error)
    assert explained(run, code=-9, world_size=1).rank == 0  # here the worker is all there is


def test_an_error_file_that_a_full_disk_left_empty_is_passed_over(run: RunDir) -> None:
    (run.errors / "rank_00000.json").write_text("")
    died(run, rank=1, message="the reason")
    assert "the reason" in str(explained(run).error)


def test_a_full_disk_is_named_when_nobody_could_write_why(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(run.path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    found = explained(run)
    assert (found.cause, type(found.error)) == ("storage_full", errors.RunDirError)


def test_only_the_last_start_is_read(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(KILLED)
    found = explained(run, code=3, log_from=len(KILLED))
    assert found.cause == "unknown"
    assert "exit code 3" in str(found.error)


def test_a_hang_names_who_holds_up_the_run_and_where_the_stacks_are(run: RunDir) -> None:
    beat = Beat(rank=1, host="far", pid=7, phase="stepping", step=4, count=9)
    stall = Stall(silent_s=10.4, limit_s=10, key="supervise.step_timeout_s", beats=(beat,), unreported=())
    hang = Hang(stall=stall, culprit=Culprit(rank=1, why="its process is stopped"))
    found = over(run, code=-9, beats=(beat,), hang=hang)
    assert (found.cause, found.rank, found.host) == ("hang", 1, "far")
    assert str(found.error) == (
        "rank 1 on far holds up the run: its process is stopped; no sign of life for 10.4 s "
        f"(supervise.step_timeout_s=10), the stacks of all ranks are in {run.logs}"
    )


def test_a_lost_host_is_named_with_its_ranks() -> None:
    found = lost_node("b", ranks=range(8, 16), why="no word from it for 60 s")
    assert (found.cause, found.rank, found.host, found.error.exit_code) == ("lost_node", 8, "b", 12)
    assert str(found.error) == "host b (ranks 8 to 15) is lost: no word from it for 60 s"
    assert str(lost_node("b", ranks=range(1, 2), why="x").error) == "host b (rank 1) is lost: x"


GONE = Lost(host="b", ranks=range(1, 2), why="no word from its launcher for 60 s")


def over(run: RunDir, **more: Any) -> Failure:
    log = run.logs / "stderr.log"
    return explain(
        run, Ending(**{"code": 1, "world_size": 2, "log": log, "log_from": 0, "beats": (), **more})
    )


def test_a_lost_host_explains_ranks_that_lost_their_peer_but_no_fault_of_their_own(run: RunDir) -> None:
    died(run, type="RuntimeError", message="Connection reset by peer")
    assert (over(run).cause, over(run, lost=(GONE,)).cause) == ("lost_rank", "lost_node")
    died(run, type="KeyError", message="typo")
    assert over(run, lost=(GONE,)).cause == "user_error"


def test_a_hang_whose_host_is_cut_off_is_a_lost_host(run: RunDir) -> None:
    stall = Stall(silent_s=11, limit_s=10, key="supervise.step_timeout_s", beats=(), unreported=(0, 1))
    hang = Hang(stall=stall, culprit=Culprit(rank=0, why="it is silent longest"))
    assert over(run, hang=hang).cause == "hang"
    assert over(run, hang=hang, lost=(GONE,)).cause == "lost_node"


def test_a_rank_that_was_killed_on_another_host_is_named_with_it(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(KILLED.replace("-9", "-15"))  # torchrun, behind it
    died(run, type="RuntimeError", message="Connection reset by peer")
    death = Death(rank=1, signal=9, host="b", log="/r/logs/stderr_node_00001.log")
    found = over(run, deaths=(death,))
    assert (found.cause, found.rank, found.host) == ("lost_rank", 1, "b")
    assert str(found.error) == "rank 1 on b was killed by SIGKILL; see /r/logs/stderr_node_00001.log"
    # NCCL's watchdog aborts ranks that lost their peer, before torchrun could end them.
    (run.logs / "stderr.log").write_text(KILLED.replace("-9", "-6"))
    assert over(run, deaths=(death,)).host == "b"
    assert "was killed by SIGABRT" in str(over(run).error)
    short = Death(rank=1, signal=9, host="b", log="l", out_of_memory=True)
    assert over(run, deaths=(short,)).cause == "out_of_memory"
