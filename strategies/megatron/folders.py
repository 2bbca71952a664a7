"""A folder of Hugging Face weights, read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.megatron import mapping
from strategies.megatron.mapping import Run, Spelling
from strategies.weight_files import INDEX, SINGLE_FILE

if TYPE_CHECKING:
    import torch

# Scaled formats: their numbers mean nothing without a second tensor of scales.
_SCALED = ("F8", "F4", "F6", "I8", "U8")


class Folder:
    """A folder of safetensors files, one or many, read slice by slice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Any] = {}
        self._files = self._find_files()

    def _find_files(self) -> dict[str, str]:
        """Return the file that holds each tensor."""
        if (self.path / INDEX).is_file():
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            files: dict[str, str] = index["weight_map"]
            return files
        if not (self.path / SINGLE_FILE).is_file():
            raise ValueError(
                f"weights={self.path} holds neither {SINGLE_FILE} nor {INDEX}; give a folder of safetensors"
            )
        return dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)

    def _handle(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"weights={self.path}: {file} cannot be read ({error}); check it") from error
        return self._open[file]

    def has(self, source: str) -> bool:
        """Say whether the folder holds `source` under one of its spellings."""
        return any(spelling.name in self._files for spelling in mapping.spellings(source))

    def read(self, run: Run, *, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Read one run along `axis` of a tensor that must have `shape`."""
        assert run.source is not None
        spelling = next(it for it in mapping.spellings(run.source) if it.name in self._files)
        lazy = self._handle(self._files[spelling.name]).get_slice(spelling.name)
        first = shape[0] * (spelling.half or 0)
        self._check(spelling, tuple(lazy.get_shape()), shape, lazy.get_dtype())
        index = [slice(None)] * len(shape)
        index[axis] = slice(first + run.start, first + run.start + run.length)
        if spelling.expert is not None:
            index.insert(0, slice(spelling.expert, spelling.expert + 1))
        found: torch.Tensor = lazy[tuple(index)]
        return found if spelling.expert is None else found[0]

    def _check(self, spelling: Spelling, found: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> None:
        rows = shape[0] * (1 if spelling.half is None else 2)
        expected = (rows, *shape[1:])
        if (found if spelling.expert is None else found[1:]) != expected:
            raise ValueError(
                f"weights={self.path}: {spelling.name} has the shape {found} where the model needs {expected}"
                f"{'' if spelling.expert is None else ' per expert'}; use the model these weights belong to"
            )
        if dtype.startswith(_SCALED):
            raise ValueError(
                f"weights={self.path}: {spelling.name} is stored as {dtype}; convert the folder to bf16 first"
            )
