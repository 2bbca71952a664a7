"""Blocks become a folder of whole tensors; from several ranks: tests/integration/test_export_deepspeed.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from strategies import hf
from strategies.deepspeed.boxes import Placement
from strategies.deepspeed.export import export
from strategies.deepspeed.holdings import holdings_of
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
    tied_embeddings=True,
)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("max_shard_bytes", [10**9, 6000])
def test_the_folder_holds_each_tensor_once(tmp_path: Path, max_shard_bytes: int) -> None:
    start, folder = tmp_path / "start", tmp_path / "folder"
    hf.create_weights(MODEL, TrainingSpec(sequence_length=8, global_batch_size=1, num_steps=1), start)
    module = hf.build_model(start, MODEL)
    engine: Any = SimpleNamespace(
        module=module, optimizer=None, device=torch.device("cpu"), zero_optimization_stage=lambda: 0
    )
    placements = {
        name: Placement(name=name, shape=tuple(p.shape), shift=(0,) * p.ndim)
        for name, p in module.named_parameters()
    }
    export(
        holdings_of(engine, placements),
        model=MODEL,
        source=start,
        directory=folder,
        max_shard_bytes=max_shard_bytes,
    )
    stored = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert stored.keys() == dict(module.named_parameters()).keys()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.float32
    assert all(
        torch.equal(one, other) for one, other in zip(again.parameters(), module.parameters(), strict=True)
    )
