"""The second half of a save, on every rank: write, agree, sum, copy to the next tier, commit.

Runs beside the training or in it; either way it talks to the other ranks over a group of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.checkpoint import files
from launcher.checkpoint.files import FileEntry
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.tiers import Tiers
from launcher.errors import CheckpointError

if TYPE_CHECKING:
    from launcher.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One save after the state was copied: all that is left to do."""

    peers: Ranks
    tiers: Tiers
    content: Manifest  # without files

    def __call__(self, write: Callable[[], None]) -> None:
        """Have the checkpoint count, or raise the same CheckpointError on every rank and leave nothing behind."""
        step, first = self.content.step, self.tiers.first
        aside = first.aside_of(step)
        self._together(write)
        seen: list[list[str]] = self._together(lambda: files.names(aside))
        mine = assigned(seen, rank=self.peers.rank)
        entries: list[list[FileEntry]] = self._together(lambda: files.entries(aside, mine))
        listed = sorted((entry for part in entries for entry in part), key=lambda entry: entry.path)
        content = replace(self.content, files=tuple(listed))
        if first is self.tiers.shared:
            self._together(lambda: self._commit(self.tiers.shared.commit, content))
            return
        # Where each node has its own disk, no node has a whole checkpoint: it counts on the shared tier only.
        whole = all(len(names) == len(listed) for names in seen)
        if whole:
            self._together(lambda: self._commit(first.commit, content))
        self._upload(first.path_of(step) if whole else aside, mine)
        self._together(lambda: self._commit(self.tiers.shared.commit, content))
        if not whole:
            first.discard(step)

    def _upload(self, source: Path, mine: Sequence[str]) -> None:
        step = self.content.step
        self._together(lambda: self._commit(self.tiers.shared.begin, step))
        target = self.tiers.shared.aside_of(step)
        self._together(lambda: copy_files(source, target, mine))

    def _commit(self, work: Callable[[T], Any], argument: T) -> None:
        if self.peers.rank == 0:
            work(argument)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Return every rank's result, or raise the first rank's failure on all."""
        result: T | None = None
        sentence = None
        try:
            result = work()
        except BaseException as error:
            # Engines wrap a full disk in types of their own, not all of them Exceptions.
            sentence = str(failure(self.content.step, self.tiers, error))
        found = self.peers.gather((result, sentence))
        if sentences := [sentence for _, sentence in found if sentence is not None]:
            for store in {self.tiers.first, self.tiers.shared}:
                store.discard(self.content.step)
            raise CheckpointError(sentences[0])
        return [result for result, _ in found]


def failure(step: int, tiers: Tiers, error: BaseException) -> CheckpointError:
    """One sentence for whatever an engine or a disk said."""
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(
        f"checkpoint of step {step} could not be written under {tiers.first.root}: {_reason(error)}; "
        "mend that (where the disk is full, free space), then resume from the one before"
    )


def _reason(error: BaseException) -> str:
    """One line: of what type the fault was, unless it is the disk's own, and what it says."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if any("Traceback" in line for line in lines):
        # torch's CheckpointException carries the tracebacks of other ranks; the reason is what they end with.
        return lines[-1]
    if "unexpected pos" in lines[0]:  # what torch's zip writer makes of a short write (inline_container.cc)
        return f"No space left on device, or no room under a limit on file sizes (torch: {lines[0]})"
    return lines[0] if isinstance(error, OSError) else f"{type(error).__name__}: {lines[0]}"


def assigned(seen: Sequence[Sequence[str]], *, rank: int) -> list[str]:
    """Deal out the files evenly, each to a rank that sees it; every rank gets the same answer about all."""
    owners: dict[str, list[int]] = {}
    for each, names in enumerate(seen):
        for name in names:
            owners.setdefault(name, []).append(each)
    return [
        name for index, name in enumerate(sorted(owners)) if owners[name][index % len(owners[name])] == rank
    ]


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy some files of a checkpoint, each flushed to disk."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        files.fsync(target / name)
