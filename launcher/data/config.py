"""DataConfig: which documents a run reads, and how they become tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Source = Literal["stdlib", "text", "jsonl", "parquet"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `data` section of the configuration."""

    source: Source
    paths: tuple[str, ...] = ()  # files, folders or globs; not used by source=stdlib
    text_field: str = "text"  # the field of a jsonl or parquet record that holds the document
    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json or the folder that holds one
    validation_fraction: float = 0.02  # share of the documents kept out of training
    cache_dir: str | None = None  # null: meshwright/data in $XDG_CACHE_HOME, or in ~/.cache
    shuffle: bool = True  # a new order of sequences in every epoch
    num_workers: int = 0  # threads that read coming steps ahead of time
    max_bytes: int | None = None  # stop reading documents after this much text; null: read all
    # Global batches that are passed over, each by the number of its first sample (consumed_samples before it).
    skip_samples: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.source == "stdlib" and self.paths:
            raise ValueError(
                f"data.paths={list(self.paths)} has no effect with data.source=stdlib; "
                "use data.source=text, jsonl or parquet, or leave data.paths empty"
            )
        if self.source != "stdlib" and not self.paths:
            raise ValueError(
                f"data.paths=[] is empty; data.source={self.source} needs files, folders or globs"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must lie above 0 and below 1"
            )
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers} must not be negative; 0 uses no threads")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data.max_bytes={self.max_bytes} must be at least 1; null reads everything")
        for key in ("text_field", "tokenizer"):
            if not getattr(self, key):
                raise ValueError(f"data.{key} is empty; give a name")

    @property
    def cache_path(self) -> Path:
        """Where token files are kept."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "meshwright" / "data"
