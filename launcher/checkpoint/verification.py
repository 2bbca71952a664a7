"""Reading a checkpoint whole with all ranks: each sums a part of its files, all come to the same answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from launcher.checkpoint import files
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.tiers import Tiers
from launcher.errors import CheckpointError

if TYPE_CHECKING:
    from launcher.ranks import Ranks

T = TypeVar("T")


def latest_good(
    peers: Ranks, tiers: Tiers, report: Callable[[str], None], *, belongs: Callable[[Manifest], None]
) -> tuple[Path, Manifest] | None:
    """`Tiers.latest_good`, the same on every rank; rank 0 lists, looks at manifests and reports."""
    leads = peers.rank == 0
    paths = peers.broadcast(tiers.committed() if leads else None)

    def verify(path: Path) -> Manifest:
        content: Manifest
        content, sentence = peers.broadcast(
            attempt(lambda: tiers.store_of(path).inspect(path)) if leads else None
        )
        if sentence is not None:
            raise CheckpointError(sentence)
        mine = content.files[peers.rank :: peers.world_size]
        found = peers.gather(attempt(lambda: files.check_sums(path, mine))[1])
        if any(found):
            raise CheckpointError(next(each for each in found if each))
        tiers.store_of(path).trust(path)
        return content

    return tiers.latest_good(report if leads else _ignore, paths=paths, verify=verify, belongs=belongs)


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result, or the sentence of the CheckpointError: what can be sent to other ranks."""
    try:
        return work(), None
    except CheckpointError as error:
        return None, str(error)


def _ignore(sentence: str) -> None:
    """Rank 0 says it."""
