from __future__ import annotations

from pathlib import Path

from launcher.supervise import memory


def test_the_kernel_counts_what_it_kills(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 7\noom_kill 3\noom_killer 9\n")
    assert memory.kills(tmp_path / "absent", host=counters) == 3


def test_kills_among_other_processes_of_the_host_are_not_ours(tmp_path: Path) -> None:
    host, own, group = (
        tmp_path / "vmstat",
        tmp_path / "cgroup",
        tmp_path / "groups" / "system.slice" / "job_7",
    )
    host.write_text("oom_kill 3\n")
    own.write_text("4:memory:/elsewhere\n0::/system.slice/job_7\n")
    group.mkdir(parents=True)
    assert memory.kills(own, groups=tmp_path / "groups", host=host) == 3  # this group is not accounted for
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 1\noom_group_kill 0\n")
    assert memory.kills(own, groups=tmp_path / "groups", host=host) == 1
    (group / "memory.events").write_text("low 0\noom 0\noom_kill 0\noom_group_kill 0\n")
    assert memory.kills(own, groups=tmp_path / "groups", host=host) == 0


def test_where_nobody_counts_nothing_was_killed(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert memory.kills(absent, groups=absent, host=absent) == 0
    (tmp_path / "other").write_text("nr_free_pages 7\n")
    assert memory.kills(absent, groups=absent, host=tmp_path / "other") == 0
    assert memory.kills() >= 0
