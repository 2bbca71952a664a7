"""Which checkpoints in one folder count: written aside, sealed by a manifest, renamed into place, checked before use.

ROOT/step_0000000020/{manifest.json, engine/, rng/}. Only rank 0 commits, prunes and discards.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from launcher.checkpoint import files, manifest
from launcher.checkpoint.manifest import Manifest
from launcher.errors import CheckpointError

_COMMITTED = re.compile(r"step_(\d{10})")
_LEFTOVER = re.compile(r"step_(\d{10})\.(?:\w+\.)?tmp")
_PARTS = ("engine", "rng")
_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints under one folder."""

    def __init__(self, root: Path, *, keep_last: int, keep_every: int = 0) -> None:
        self.root = root
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._known_good: set[Path] = set()  # read or written whole by this process

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` lies once it is committed."""
        return self.root / f"step_{step:010d}"

    def aside_of(self, step: int) -> Path:
        """Where it lies until then."""
        return self.root / f"step_{step:010d}.tmp"

    def committed(self) -> list[Path]:
        """All finished checkpoints, newest first; whether each is good, `verify` tells."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if path.is_dir() and _COMMITTED.fullmatch(path.name)]
        return sorted(found, reverse=True)

    def begin(self, step: int) -> Path:
        """Create a fresh folder aside, with `engine/` and `rng/`, for every rank to write into."""
        with self.writing(step):
            shutil.rmtree(self.aside_of(step), ignore_errors=True)
            return self.join(step)

    def join(self, step: int) -> Path:
        """Have the folder aside here as well: a node's own disk is not rank 0's."""
        aside = self.aside_of(step)
        with self.writing(step):
            for part in _PARTS:
                (aside / part).mkdir(parents=True, exist_ok=True)
        return aside

    def commit(self, content: Manifest) -> Path:
        """Make what lies aside count: manifest, rename, prune. Call once all its files are written and flushed."""
        aside, final = self.aside_of(content.step), self.path_of(content.step)
        with self.writing(content.step):
            if not any(entry.path.startswith("engine/") for entry in content.files):
                raise CheckpointError(
                    f"checkpoint step {content.step} holds no files: "
                    f"plan.strategy={content.plan.strategy} saved none"
                )
            files.check_sizes(aside, content.files)
            manifest.write(aside, content)
            if final.exists():  # a damaged one that this run has trained past again
                final.rename(final.with_name(f"{final.name}.replaced.tmp"))
            aside.rename(final)
            files.fsync(self.root)
        self.trust(final)
        self.prune()
        return final

    def discard(self, step: int) -> None:
        """Drop what lies aside for `step`, after a rank failed to write its part."""
        shutil.rmtree(self.aside_of(step), ignore_errors=True)

    def verify(self, path: Path) -> Manifest:
        """Read a checkpoint whole; return its manifest or raise CheckpointError with one sentence."""
        content = self.inspect(path)
        files.check_sums(path, content.files)
        self.trust(path)
        return content

    def trust(self, path: Path) -> None:
        """Remember that somebody has read this one whole and found it good."""
        self._known_good.add(path)

    def inspect(self, path: Path) -> Manifest:
        """Look at all but the data: manifest, names, sizes."""
        content = manifest.read(path)
        files.check_sizes(path, content.files)
        if path.name != self.path_of(content.step).name:
            raise CheckpointError(
                f"{path} holds a manifest of step {content.step}; give the folder its own name back"
            )
        return content

    def prune(self) -> None:
        """Remove what is not kept; never the newest good one, nor anything newer."""
        paths = self.committed()
        newest = next((path for path in paths if path in self._known_good or self._is_good(path)), None)
        if newest is None:
            return
        older = paths[paths.index(newest) + 1 :]
        kept = list(islice(filter(self._is_whole, older), self.keep_last - 1))
        for path in older:
            if path not in kept and not (self.keep_every and step_of(path) % self.keep_every == 0):
                self._remove(path)
        for path in self.root.iterdir():
            leftover = _LEFTOVER.fullmatch(path.name)
            if leftover and int(leftover[1]) <= step_of(newest):
                shutil.rmtree(path, ignore_errors=True)

    def _is_good(self, path: Path) -> bool:
        try:
            self.verify(path)
        except CheckpointError:
            return False
        return True

    def _is_whole(self, path: Path) -> bool:
        """Cheap: the data is not read."""
        try:
            self.inspect(path)
        except CheckpointError:
            return False
        return True

    def _remove(self, path: Path) -> None:
        """Rename before deleting, so that a half-deleted checkpoint never looks like one."""
        doomed = path.with_name(f"{path.name}.removed.tmp")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            # The new checkpoint is safe; a full trash is no reason to stop training.
            _log.warning("could not remove old checkpoint %s: %s", path, error.strerror)
        self._known_good.discard(path)

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Turn a full or read-only disk into one sentence, and leave nothing half-written behind."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            self.discard(step)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"could not write checkpoint step {step} under {self.root}: {error.strerror or error}; "
                f"free space there or make it writable (the newest {self.keep_last} are kept)"
            ) from error


def step_of(path: Path) -> int:
    """Read the step out of a checkpoint's name."""
    match = _COMMITTED.fullmatch(path.name)
    assert match, f"{path} is not a checkpoint's name"
    return int(match[1])
