"""Checkpoints nobody has to trust: what counts, what is kept, how it gets to disk beside the training."""

from launcher.checkpoint.files import FileEntry
from launcher.checkpoint.manifest import LAYOUT, Manifest, check_belongs
from launcher.checkpoint.policy import CheckpointPolicy
from launcher.checkpoint.store import CheckpointStore
from launcher.checkpoint.tiers import Tiers, open_tiers

__all__ = [
    "LAYOUT",
    "CheckpointPolicy",
    "CheckpointStore",
    "FileEntry",
    "Manifest",
    "Tiers",
    "check_belongs",
    "open_tiers",
]
