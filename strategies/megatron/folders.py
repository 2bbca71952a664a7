"""A folder of Hugging Face weights: reads slices of its safetensors files, and writes such a folder file by file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.megatron import mapping
from strategies.megatron.mapping import Run, Spelling

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_SHARD_BYTES = 4 * 10**9
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


def plan_files(sizes: Iterable[tuple[str, int]], max_shard_bytes: int) -> dict[str, str]:
    """Return the file of every tensor, given names and bytes in the order of writing."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if files[-1] and filled + size > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    if len(files) == 1:
        return dict.fromkeys(files[0], SINGLE_FILE)
    count = len(files)
    return {
        name: f"model-{number:05}-of-{count:05}.safetensors"
        for number, names in enumerate(files, start=1)
        for name in names
    }


class Writer:
    """Writes tensors in the order of the plan, one file after the other; the index and config.json come last."""

    def __init__(self, directory: Path, files: Mapping[str, str]) -> None:
        self._directory = directory
        self._files = files
        self._pending: dict[str, torch.Tensor] = {}
        self._total_bytes = 0
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take further tensors; a file is written when its last one has come."""
        for name, tensor in tensors.items():
            if self._pending and self._files[next(iter(self._pending))] != self._files[name]:
                self._flush()
            self._pending[name] = tensor.cpu()
            self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        from safetensors.torch import save_file

        file = self._directory / self._files[next(iter(self._pending))]
        save_file(self._pending, file, metadata={"format": "pt"})
        self._pending = {}

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the last file, then what makes the folder complete."""
        self._flush()
        if set(self._files.values()) != {SINGLE_FILE}:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(self._files)}
            _write_json(self._directory / INDEX, index)
        _write_json(self._directory / CONFIG, config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_for(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's config.json for weights of `dtype`."""
    file = source / CONFIG
    if not file.is_file():
        raise ValueError(f"source={source} has no {CONFIG}; give the folder the weights came from")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for stale in ("torch_dtype", "quantization_config"):
        config.pop(stale, None)
    return config | {"dtype": str(dtype).removeprefix("torch.")}
