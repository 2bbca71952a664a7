from __future__ import annotations

import os
from pathlib import Path

from launcher import heartbeat
from launcher.heartbeat import Heart


def test_a_beat_tells_where_its_rank_stands(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    assert heartbeat.read(folder, 3) is None
    heart = Heart(folder, rank=3)
    first = heartbeat.read(folder, 3)
    assert first is not None
    assert (first.rank, first.pid, first.phase, first.step, first.count) == (3, os.getpid(), "starting", 0, 1)
    heart.beat("stepping", 12)
    second = heartbeat.read(folder, 3)
    assert second is not None
    assert (second.phase, second.step, second.count) == ("stepping", 12, 2)


def test_the_file_keeps_its_size_so_that_a_full_disk_stops_no_beat(tmp_path: Path) -> None:
    heart = Heart(tmp_path / "h", rank=0)
    size = heartbeat.file_of(tmp_path / "h", 0).stat().st_size
    heart.beat("evaluating", 10**12)
    assert heartbeat.file_of(tmp_path / "h", 0).stat().st_size == size


def test_a_folder_that_cannot_be_made_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    Heart(tmp_path / "taken", rank=0).beat("stepping", 1)
    assert heartbeat.read(tmp_path / "taken", 0) is None


def test_damage_is_a_rank_that_has_not_reported_yet(tmp_path: Path) -> None:
    for rank in range(3):
        Heart(tmp_path, rank=rank)
    heartbeat.file_of(tmp_path, 1).write_text('{"rank": 1, "ho')
    assert [beat.rank for beat in heartbeat.read_all(tmp_path, world_size=4)] == [0, 2]
