"""Folders are read in every layout that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from strategies.megatron.folders import Folder
from strategies.megatron.mapping import Run
from strategies.weight_files import INDEX

MATRIX = torch.arange(24.0).view(6, 4)


def run_of(source: str, start: int = 0, length: int = 2) -> Run:
    return Run(source=source, start=start, length=length)


def test_one_file_is_read_in_slices(tmp_path: Path) -> None:
    save_file({"model.a": MATRIX}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    rows = folder.read(run_of("model.a", 2, 3), axis=0, shape=(6, 4))
    columns = folder.read(run_of("model.a", 1, 2), axis=1, shape=(6, 4))
    assert torch.equal(rows, MATRIX[2:5])
    assert torch.equal(columns, MATRIX[:, 1:3])


def test_many_files_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"model.a": MATRIX}, tmp_path / "one.safetensors")
    save_file({"model.b": MATRIX + 1}, tmp_path / "two.safetensors")
    index = {"weight_map": {"model.a": "one.safetensors", "model.b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    folder = Folder(tmp_path)
    found = [folder.read(run_of(name), axis=0, shape=(6, 4))[0, 0].item() for name in ("model.a", "model.b")]
    assert found == [0, 1]


def test_a_missing_first_word_is_accepted(tmp_path: Path) -> None:
    save_file({"wte.weight": MATRIX}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    assert folder.has("transformer.wte.weight")
    assert not folder.has("transformer.wpe.weight")
    found = folder.read(run_of("transformer.wte.weight"), axis=0, shape=(6, 4))
    assert torch.equal(found, MATRIX[:2])


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    gate_up, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    names = {"model.layers.0.mlp.experts.gate_up_proj": gate_up, "model.layers.0.mlp.experts.down_proj": down}
    save_file(names, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    mixtral, qwen = "model.layers.0.block_sparse_moe.experts.2.", "model.layers.0.mlp.experts.1."
    up = folder.read(run_of(mixtral + "w3.weight", 1, 2), axis=0, shape=(4, 5))
    gate = folder.read(run_of(qwen + "gate_proj.weight", 1, 2), axis=0, shape=(4, 5))
    rows = folder.read(run_of(qwen + "down_proj.weight", 1, 2), axis=1, shape=(5, 4))
    assert torch.equal(up, gate_up[2, 5:7])
    assert torch.equal(gate, gate_up[1, 1:3])
    assert torch.equal(rows, down[1, :, 1:3])


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    fused = "model.layers.0.mlp.experts.down_proj"
    save_file({"model.a": MATRIX, fused: torch.zeros(3, 5, 4)}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    with pytest.raises(ValueError, match=r"model\.a has the shape \(6, 4\) where the model needs \(6, 5\)"):
        folder.read(run_of("model.a"), axis=0, shape=(6, 5))
    with pytest.raises(ValueError, match=r"\(3, 5, 4\) where the model needs \(5, 6\) per expert"):
        folder.read(run_of("model.layers.0.mlp.experts.0.down_proj.weight"), axis=0, shape=(5, 6))


def test_scaled_numbers_are_refused(tmp_path: Path) -> None:
    save_file({"model.a": MATRIX.to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.a is stored as F8_E4M3; convert"):
        Folder(tmp_path).read(run_of("model.a"), axis=0, shape=(6, 4))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Folder(tmp_path)


@pytest.mark.parametrize("content", [b"not safetensors", None])
def test_a_broken_or_absent_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "part.safetensors").write_bytes(content)
    index = {"weight_map": {"model.a": "part.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"part\.safetensors cannot be read"):
        Folder(tmp_path).read(run_of("model.a"), axis=0, shape=(6, 4))
