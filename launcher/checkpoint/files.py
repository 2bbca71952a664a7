"""Files of a checkpoint on disk: listed, flushed, summed, and refused where they are not what was listed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from launcher.errors import CheckpointError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 8 * 2**20
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint, relative to its folder."""

    path: str
    size: int  # bytes
    crc32: int

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in self.path:
            raise ValueError(
                f"files.path={self.path} leaves the checkpoint's folder; only relative paths are read"
            )


def names(directory: Path) -> list[str]:
    """Every file below `directory` but the manifest, relative to it; a link is a CheckpointError."""
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link; a checkpoint must hold its own files")
        relative = path.relative_to(directory).as_posix()
        if not path.is_dir() and relative != MANIFEST:
            found.append(relative)
    return found


def entries(directory: Path, paths: Sequence[str]) -> list[FileEntry]:
    """Size and checksum of these files, each flushed to disk first."""
    for path in paths:
        fsync(directory / path)

    def entry(path: str) -> FileEntry:
        file = directory / path
        return FileEntry(path=path, size=file.stat().st_size, crc32=checksum(file))

    return _in_threads(entry, paths)


def check_sums(directory: Path, listed: Sequence[FileEntry]) -> None:
    """Read these files whole; raise CheckpointError unless they are as listed, to the last bit."""
    found = _in_threads(lambda entry: checksum(directory / entry.path), listed)
    for entry, value in zip(listed, found, strict=True):
        if value != entry.crc32:
            raise CheckpointError(
                f"{directory / entry.path} has checksum {value:08x}, the manifest says "
                f"{entry.crc32:08x}: its bytes changed after they were written"
            )


def check_sizes(directory: Path, listed: Sequence[FileEntry]) -> None:
    """Look at names and sizes only: cheap, the data is not read."""
    there = set(names(directory))
    for entry in listed:
        file = directory / entry.path
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != entry.size:
            raise CheckpointError(f"{file} has {size} bytes, the manifest says {entry.size}")
    # Engines find some of their files by pattern, so that a file too many may be read as well.
    if more := sorted(there - {entry.path for entry in listed}):
        raise CheckpointError(f"{directory / more[0]} is not in the manifest; remove it, it was added later")


def checksum(path: Path) -> int:
    """CRC-32 of a file, streamed; zlib frees the interpreter lock, so threads help."""
    value = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                value = zlib.crc32(chunk, value)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return value


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
