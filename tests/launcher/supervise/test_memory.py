from __future__ import annotations

from pathlib import Path

from launcher.supervise import memory


def test_the_kernel_counts_what_it_kills(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 7\noom_kill 3\noom_killer 9\n")
    assert memory.kills(counters) == 3


def test_where_nobody_counts_nothing_was_killed(tmp_path: Path) -> None:
    assert memory.kills(tmp_path / "absent") == 0
    (tmp_path / "other").write_text("nr_free_pages 7\n")
    assert memory.kills(tmp_path / "other") == 0
    assert memory.kills() >= 0
