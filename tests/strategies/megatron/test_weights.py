"""Cutting for every rank and joining again gives back each tensor bit by bit; no process group, no Megatron-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from strategies.megatron import weights
from strategies.megatron.folders import Folder
from strategies.megatron.mapping import Piece, pieces
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec

SHAPE: dict[str, Any] = {
    "name": "tiny",
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 8,
    "ffn_hidden_size": 24,
    "vocab_size": 77,
    "max_position_embeddings": 8,
}
MODELS = {
    "qwen2": ModelSpec(**SHAPE, model_type="qwen2", num_kv_heads=4, attention_bias=True),
    "gpt2": ModelSpec(
        **SHAPE,
        model_type="gpt2",
        gated_mlp=False,
        learned_positions=True,
        tied_embeddings=True,
        norm="layernorm",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    "deepseek": ModelSpec(
        **SHAPE,
        model_type="deepseek_v3",
        moe=MoeSpec(num_experts=2, top_k=1, expert_ffn_hidden_size=12, shared_ffn_hidden_size=12),
        mla=MlaSpec(q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5),
    ),
}
PADDED = 128


def table(name: str, degree: int) -> list[Piece]:
    return list(pieces(MODELS[name], padded_vocab_size=PADDED, tp=degree, etp=degree))


def make_folder(path: Path, name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {source: shape for piece in table(name, 1) for source, shape in piece.sources().items()}
    tensors = {
        source: torch.randn(shape, generator=draw, dtype=torch.float32).to(dtype)
        for source, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    return tensors


def cut(piece: Piece, rank: int, degree: int, folder: Folder) -> torch.Tensor:
    shape = [size // degree if axis == piece.dim else size for axis, size in enumerate(piece.shape)]
    part = torch.full(shape, float("nan"))
    weights.fill(part, piece, piece.part(rank, degree), folder)
    return part


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_joining_undoes_cutting(tmp_path: Path, name: str, degree: int) -> None:
    tensors = make_folder(tmp_path, name)
    joined: dict[str, torch.Tensor] = {}
    folder = Folder(tmp_path)
    for piece in table(name, degree):
        count = degree if piece.cut_over else 1
        parts = [cut(piece, rank, count, folder) for rank in range(count)]
        joined |= weights.join(piece, torch.cat(parts, dim=piece.dim))
    assert set(joined) == set(tensors)
    assert all(torch.equal(joined[source], tensors[source]) for source in tensors)


def test_a_rank_gets_whole_heads(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, "qwen2")
    piece = next(it for it in table("qwen2", 4) if it.name.endswith("linear_qkv.bias"))
    q, k, v = (tensors[f"model.layers.0.self_attn.{part}_proj.bias"] for part in "qkv")
    wanted = torch.cat([q[12:16], k[6:8], v[6:8]])
    assert torch.equal(cut(piece, 3, 4, Folder(tmp_path)), wanted)


def test_padding_is_zero(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, "qwen2")
    piece = table("qwen2", 2)[0]
    second = cut(piece, 1, 2, Folder(tmp_path))
    assert torch.equal(second[:13], tensors["model.embed_tokens.weight"][64:])
    assert not second[13:].any()


def test_numbers_are_cast_to_the_parameter(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, "gpt2", torch.bfloat16)
    piece = next(it for it in table("gpt2", 1) if it.name.endswith("linear_fc1.weight"))
    part = cut(piece, 0, 1, Folder(tmp_path))
    assert part.dtype == torch.float32
    assert torch.equal(part, tensors["transformer.h.0.mlp.c_fc.weight"].T.float())
