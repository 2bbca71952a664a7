from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher import errors, supervise
from launcher.run_dir import RunDir


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


def test_a_foreign_exception_names_rank_host_frame_and_traceback(run: RunDir) -> None:
    died(run, rank=1)
    error = supervise.explain(run, code=1)
    assert type(error) is errors.TrainingError
    assert str(error) == "rank 1 on h failed at train.py:3: ValueError: boom; full traceback in t.txt"


def test_our_own_sentence_keeps_its_class(run: RunDir) -> None:
    died(run, exit_code=6, type="CheckpointError", message="none is good")
    error = supervise.explain(run, code=1)
    assert type(error) is errors.CheckpointError
    assert str(error) == "none is good"


def test_a_lost_connection_is_a_consequence_not_the_cause(run: RunDir) -> None:
    died(run, rank=0, time=1.0, message="Connection closed by peer [127.0.0.1]")
    died(run, rank=1, time=2.0, message="the real reason")
    assert "the real reason" in str(supervise.explain(run, code=1))


def test_a_message_that_merely_mentions_a_peer_is_a_cause(run: RunDir) -> None:
    died(run, rank=0, time=1.0, message="peer review of the data failed")
    died(run, rank=1, time=2.0, type="DistBackendError", message="NCCL error")
    assert "peer review" in str(supervise.explain(run, code=1))


def test_a_signal_is_read_from_the_summary(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(
        "[1]:\n  time      : now\n  host      : h\n  rank      : 1 (local_rank: 1)\n"
        "  exitcode  : -9 (pid: 77)\n  error_file: <N/A>\n"
    )
    error = supervise.explain(run, code=1)
    assert type(error) is errors.TrainingError
    assert "rank 1 was killed by SIGKILL" in str(error)


def test_the_root_cause_is_read_not_what_it_caused(run: RunDir) -> None:
    (run.logs / "stderr.log").write_text(
        "Other Failures:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 76)\n"
        "Root Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)\n"
    )
    assert "rank 1 was killed by SIGKILL" in str(supervise.explain(run, code=1))


def test_a_killed_rank_explains_the_connections_it_broke(run: RunDir) -> None:
    died(run, rank=0, message="Read error [127.0.0.1]:43159: Connection reset by peer.")
    (run.logs / "stderr.log").write_text(
        "Root Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)\n"
    )
    assert "rank 1 was killed by SIGKILL" in str(supervise.explain(run, code=1))


def test_the_killed_rank_is_found_when_its_victim_was_noticed_first(run: RunDir) -> None:
    died(run, rank=0, message="Connection closed by peer [127.0.0.1]:21918.")
    (run.logs / "stderr.log").write_text(
        "Failures:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)\n"
        "  rank      : 2 (local_rank: 2)\n  exitcode  : -15 (pid: 78)\n"
        "Root Cause (first observed failure):\n  rank      : 0 (local_rank: 0)\n  exitcode  : 9 (pid: 76)\n"
    )
    assert "rank 1 was killed by SIGKILL" in str(supervise.explain(run, code=1))


def test_an_error_file_that_a_full_disk_left_empty_is_passed_over(run: RunDir) -> None:
    (run.errors / "rank_00000.json").write_text("")
    died(run, rank=1, message="the reason")
    assert "the reason" in str(supervise.explain(run, code=1))


def test_a_full_disk_is_named_when_nobody_could_write_why(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(run.path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert type(supervise.explain(run, code=1)) is errors.RunDirError


def test_only_the_last_start_is_read(run: RunDir) -> None:
    text = "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 77)\n"
    (run.logs / "stderr.log").write_text(text)
    error = supervise.explain(run, code=3, stderr_from=len(text))
    assert "exit code 3" in str(error)
