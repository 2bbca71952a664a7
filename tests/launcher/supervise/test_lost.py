from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.heartbeat import Heart
from launcher.run_dir import RunDir
from launcher.supervise import lost


def test_lost_hosts_are_told_with_the_ranks_that_beat_there(
    frozen: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = frozen()
    monkeypatch.setattr("socket.gethostname", lambda: "node3.site")
    Heart(run.heartbeats, rank=1)
    assert lost.main([str(run.path), "node3", "node4"]) == 0
    first, second = (event for event in run.events() if event["event"] == "failed")
    assert (first["cause"], first["host"], first["rank"], first["exit_code"]) == ("lost_node", "node3", 1, 12)
    assert (second["host"], second["rank"]) == ("node4", None)
    assert "host node3 (rank 1) is lost: Slurm calls it down" in capsys.readouterr().err
