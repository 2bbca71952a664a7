from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoint import files
from launcher.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "a.bin").write_bytes(os.urandom(3000))
    (tmp_path / "engine" / "b.bin").write_bytes(b"")
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


def test_all_files_but_the_manifest_are_listed_and_summed(folder: Path) -> None:
    assert files.names(folder) == ["engine/a.bin", "engine/b.bin"]
    a, b = files.entries(folder, files.names(folder))
    assert (a.size, a.crc32) == (3000, zlib.crc32((folder / "engine" / "a.bin").read_bytes()))
    assert (b.path, b.size, b.crc32) == ("engine/b.bin", 0, 0)
    files.check_sizes(folder, [a, b])
    files.check_sums(folder, [a, b])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "engine" / "b.bin").unlink(), "b.bin is missing"),
        (lambda f: os.truncate(f / "engine" / "a.bin", 2999), "has 2999 bytes"),
        (lambda f: (f / "engine" / "a.bin").write_bytes(os.urandom(3000)), "has checksum"),
        (lambda f: (f / "engine" / "c.bin").touch(), "c.bin is not in the manifest"),
        (lambda f: (f / "engine" / "c.bin").symlink_to("a.bin"), "c.bin is a link"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not in the manifest"),
    ],
)
def test_what_is_not_as_listed_is_refused(
    folder: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    listed = files.entries(folder, files.names(folder))
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        files.check_sizes(folder, listed)
        files.check_sums(folder, listed)


def test_sizes_alone_do_not_read_the_data(folder: Path) -> None:
    listed = files.entries(folder, files.names(folder))
    files.check_sizes(folder, [replace(entry, crc32=1) for entry in listed])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone cannot be read"):
        files.checksum(tmp_path / "gone")
