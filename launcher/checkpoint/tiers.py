"""Where checkpoints lie: the run directory, and perhaps a fast local disk that they go to first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.policy import CheckpointPolicy
from launcher.checkpoint.store import CheckpointStore, step_of
from launcher.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """The stores of one run. With a fast one, what is there first is copied to the shared one."""

    shared: CheckpointStore
    fast: CheckpointStore | None = None

    @property
    def first(self) -> CheckpointStore:
        """Where the ranks write."""
        return self.fast or self.shared

    def committed(self) -> list[Path]:
        """All finished checkpoints, newest first, of one step the fast one first."""
        tiers = [store for store in (self.fast, self.shared) if store is not None]
        paths = [(path, -rank) for rank, store in enumerate(tiers) for path in store.committed()]
        return [path for path, _ in sorted(paths, key=lambda each: (step_of(each[0]), each[1]), reverse=True)]

    def store_of(self, path: Path) -> CheckpointStore:
        """The tier that holds this checkpoint."""
        return self.fast if self.fast is not None and path.parent == self.fast.root else self.shared

    def verify(self, path: Path) -> Manifest:
        """Read a checkpoint of either tier whole."""
        return self.store_of(path).verify(path)

    def latest_good(
        self,
        report: Callable[[str], None],
        *,
        paths: Sequence[Path] | None = None,
        verify: Callable[[Path], Manifest] | None = None,
        belongs: Callable[[Manifest], None] = lambda manifest: None,
    ) -> tuple[Path, Manifest] | None:
        """Return the newest checkpoint of both tiers that verifies; `report` hears of each one skipped and why.

        `paths` and `verify` are for ranks that look together, at the same folders. `belongs` raises CheckpointError for
        one of another run: on the fast tier, which a run does not own as it owns its directory, that one is skipped
        as well.
        """
        for path in self.committed() if paths is None else paths:
            try:
                manifest = (verify or self.verify)(path)
                if path.parent != self.shared.root:
                    belongs(manifest)
            except CheckpointError as error:
                report(f"skipped checkpoint {path.name} in {path.parent}: {error}")
            else:
                return path, manifest
        return None


def open_tiers(policy: CheckpointPolicy, *, checkpoints: Path, identity: Path) -> Tiers:
    """Return the stores of the run with this `checkpoints` folder.

    `identity` is a file frozen with the run. The fast tier's folder is named by it and by where the run lies, so that
    neither a new run in an old place nor a copy of a run finds another one's checkpoints.
    """
    shared = CheckpointStore(checkpoints, keep_last=policy.keep_last, keep_every=policy.keep_every)
    if policy.fast_dir is None:
        return Tiers(shared=shared)
    content = identity.read_bytes() if identity.exists() else b""
    name = hashlib.sha256(str(checkpoints.resolve()).encode() + b"\0" + content).hexdigest()[:16]
    fast = CheckpointStore(Path(policy.fast_dir) / f"meshwright-{name}", keep_last=policy.keep_last_fast)
    return Tiers(shared=shared, fast=fast)
