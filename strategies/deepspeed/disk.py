"""The folder on a local disk that ZeRO-Infinity swaps to: checked before use, one of its own for every process."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

GIB = 2**30
_PREFIX = "meshwright-swap-"
_held: dict[Path, int | None] = {}  # locks of this process
_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "9p", "glusterfs"})


def open_folder(directory: str, *, num_bytes: float) -> Path:
    """Create this process' folder below `directory`, where its share of `num_bytes` fits; ValueError where not."""
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(
            f"plan.nvme_path={directory} is no folder on this host; make it on a local disk of every node"
        )
    if not os.access(root, os.W_OK | os.X_OK):
        raise ValueError(f"plan.nvme_path={directory} cannot be written to; give a folder that you own")
    if reason := _why_not_local(_file_system(root)):
        raise ValueError(f"plan.nvme_path={directory} {reason}; give a folder on a local disk")
    with _alone(root):  # a folder without its lock would be a leftover to the other ranks
        _remove_leftovers(root)
        free = shutil.disk_usage(root).free
        if num_bytes > free:
            raise ValueError(
                f"plan.nvme_path={directory} has {free / GIB:.1f} GiB free and this host's ranks swap "
                f"{num_bytes / GIB:.1f} GiB; free space there, or use more nodes"
            )
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        _held[folder] = _lock(_lock_file(folder))
    return folder


def remove_folder(folder: Path) -> None:
    """Give the disk its space back."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_file(folder).unlink(missing_ok=True)
    if (lock := _held.pop(folder, None)) is not None:
        os.close(lock)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep other processes that open a folder below `root` waiting."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path) -> None:
    """Delete what processes left behind that are no more: nobody holds their locks."""
    for file in root.glob(f"{_PREFIX}*.lock"):
        if (lock := _lock(file)) is not None:
            remove_folder(file.with_suffix(""))
            os.close(lock)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _lock(file: Path) -> int | None:
    """Take the lock, for as long as this process lives; None where another one has it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _why_not_local(file_system: str) -> str | None:
    if file_system in _MEMORY:
        return f"lies in memory ({file_system})"
    if file_system in _NETWORK or file_system.startswith("fuse."):
        return f"lies behind a network ({file_system})"
    return None


def _file_system(path: Path) -> str:
    """Return the kind of the file system that `path` lies in, of the innermost mount around it."""
    around = [path.resolve(), *path.resolve().parents]
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in around if folder in mounts), "")
