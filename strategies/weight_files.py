"""A folder of Hugging Face weights, written file by file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_SHARD_BYTES = 4 * 10**9


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
