"""When to save, where, and what to keep: the `checkpoint` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """The keys under `checkpoint`."""

    # Steps between checkpoints; 0: only at the end; auto: from what a save costs and how often the cluster fails.
    interval: int | Literal["auto"] = 0
    keep_last: int = 2  # newest ones kept
    keep_every: int = 0  # steps divisible by it are never pruned; 0: none
    save_last: bool = True  # also after the last step
    asynchronous: bool = True  # copy to host memory and write beside the training, where the engine can
    on_failed_save: Literal["stop", "continue"] = "stop"  # the checkpoint at the end is never given up on
    grace_s: float = 180.0  # between a request to stop and the kill that follows it
    fast_dir: str | None = (
        None  # local disk that checkpoints go to first; null: straight to the run directory
    )
    keep_last_fast: int = 1  # newest ones kept there
    mttf_hours: float | None = (
        None  # of the whole job, for interval=auto; null: from cluster and number of GPUs
    )

    def __post_init__(self) -> None:
        for key in ("keep_last", "keep_last_fast"):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"checkpoint.{key}={getattr(self, key)} must be at least 1, "
                    "or no checkpoint would be left to resume from"
                )
        for key, off in (("interval", "0 saves only at the end"), ("keep_every", "0 keeps only the newest")):
            value = getattr(self, key)
            if value != "auto" and value < 0:
                raise ValueError(f"checkpoint.{key}={value} must not be negative; {off}")
        for key in ("grace_s", "mttf_hours"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"checkpoint.{key}={value} must be above 0")
        if self.fast_dir is not None and not Path(self.fast_dir).is_absolute():
            raise ValueError(
                f"checkpoint.fast_dir={self.fast_dir} must be an absolute path: every node looks for its own"
            )
