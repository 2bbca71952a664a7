"""The folder that is swapped to: refused where it is none of a local disk's, and never left behind for long."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from strategies.deepspeed import disk


def test_a_folder_of_its_own_goes_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda path: "ext4")
    first, second = (disk.open_folder(str(tmp_path), num_bytes=1) for _ in range(2))
    assert first != second and first.is_dir() and second.is_dir()
    disk.remove_folder(first)
    disk.remove_folder(second)
    assert list(tmp_path.iterdir()) == []


def test_what_the_dead_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda path: "ext4")
    alive, dead, foreign = (tmp_path / name for name in ("meshwright-swap-a", "meshwright-swap-b", "other"))
    for folder in (alive, dead, foreign):
        folder.mkdir()
        folder.with_name(f"{folder.name}.lock").touch()
    lock = os.open(tmp_path / "meshwright-swap-a.lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    disk.remove_folder(disk.open_folder(str(tmp_path), num_bytes=1))
    os.close(lock)
    assert alive.is_dir() and foreign.is_dir() and not dead.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plan.nvme_path=\S*nowhere is no folder on this host; make it"):
        disk.open_folder(str(tmp_path / "nowhere"), num_bytes=1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tmpfs", r"lies in memory \(tmpfs\)"),
        ("nfs4", "behind a network"),
        ("fuse.sshfs", "behind a network"),
    ],
)
def test_a_folder_on_no_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda path: kind)
    with pytest.raises(ValueError, match=words):
        disk.open_folder(str(tmp_path), num_bytes=1)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda path: "ext4")
    with pytest.raises(ValueError, match=r"GiB free and this host's ranks swap 1048576.0 GiB"):
        disk.open_folder(str(tmp_path), num_bytes=2.0**50)


def test_the_innermost_mount_decides() -> None:
    assert disk._file_system(Path("/proc/self")) == "proc"
