"""Folders are read in every layout that transformers writes, and written file by file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from strategies.megatron import folders
from strategies.megatron.folders import Folder, Writer, config_for, plan_files
from strategies.megatron.mapping import Run

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
    (tmp_path / folders.INDEX).write_text(json.dumps(index), encoding="utf-8")
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
    (tmp_path / folders.INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"part\.safetensors cannot be read"):
        Folder(tmp_path).read(run_of("model.a"), axis=0, shape=(6, 4))


def test_small_models_are_one_file() -> None:
    assert plan_files([("a", 4), ("b", 6)], 10) == {"a": "model.safetensors", "b": "model.safetensors"}


def test_files_are_filled_in_order() -> None:
    planned = plan_files([("a", 4), ("b", 6), ("c", 1), ("d", 20), ("e", 3)], 10)
    first, second, third, fourth = (f"model-{number:05}-of-00004.safetensors" for number in range(1, 5))
    assert planned == {"a": first, "b": first, "c": second, "d": third, "e": fourth}


def test_the_writer_keeps_one_file_in_memory(tmp_path: Path) -> None:
    tensors = {name: MATRIX + number for number, name in enumerate("abcde")}
    files = plan_files([(name, 96) for name in tensors], 200)
    writer = Writer(tmp_path / "new", files)
    present = []
    for name, tensor in tensors.items():
        writer.add({name: tensor})
        present.append(len(list((tmp_path / "new").iterdir())))
    writer.finish({"model_type": "llama"})
    assert present == [0, 0, 1, 1, 2]
    index = json.loads((tmp_path / "new" / folders.INDEX).read_text(encoding="utf-8"))
    assert index == {"metadata": {"total_size": 480}, "weight_map": files}
    assert json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8")) == {
        "model_type": "llama"
    }
    read = {k: v for file in set(files.values()) for k, v in load_file(tmp_path / "new" / file).items()}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    writer = Writer(tmp_path, plan_files([("a", 96)], 200))
    writer.add({"a": MATRIX})
    writer.finish({})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_config_follows_the_numbers(tmp_path: Path) -> None:
    old = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": {}, "vocab_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(old), encoding="utf-8")
    assert config_for(tmp_path, torch.bfloat16) == {
        "model_type": "llama",
        "vocab_size": 7,
        "dtype": "bfloat16",
    }
    with pytest.raises(ValueError, match=r"has no config\.json; give the folder"):
        config_for(tmp_path / "nowhere", torch.float32)
