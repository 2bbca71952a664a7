"""Weights are written file by file, and the folder is whole once its config.json is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from strategies.weight_files import INDEX, Writer, config_for, plan_files

MATRIX = torch.arange(24.0).view(6, 4)


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
    index = json.loads((tmp_path / "new" / INDEX).read_text(encoding="utf-8"))
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
