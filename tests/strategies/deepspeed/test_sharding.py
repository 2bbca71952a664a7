"""What AutoTP cuts, what stays whole, and whose gradients are added up. The loss: tests/integration."""

from __future__ import annotations

from typing import Any

LAYER = "model.layers.0"


def test_matrices_and_vocabulary_are_cut_in_two(built: dict[str, Any]) -> None:
    shapes = built["tensor"]["shapes"]
    assert shapes["model.embed_tokens.weight"] == [16, 16]
    assert shapes[f"{LAYER}.self_attn.q_proj.weight"] == [8, 16]
    assert shapes[f"{LAYER}.self_attn.k_proj.weight"] == [4, 16]
    assert shapes[f"{LAYER}.self_attn.o_proj.weight"] == [16, 8]
    assert shapes[f"{LAYER}.mlp.up_proj.weight"] == [16, 16]
    assert shapes[f"{LAYER}.mlp.down_proj.weight"] == [16, 16]
    assert "lm_head.weight" not in shapes  # still the table of tokens


def test_what_is_cut_is_marked_for_the_norm(built: dict[str, Any]) -> None:
    found = built["tensor"]
    norms = {name for name in found["shapes"] if "norm" in name}
    assert set(found["cut"]) == set(found["shapes"]) - norms


def test_norms_over_heads_add_up_their_gradients(built: dict[str, Any]) -> None:
    found = built["tensor"]
    assert set(found["summed"]) == {name for name in found["shapes"] if "q_norm" in name or "k_norm" in name}
    assert len(found["summed"]) == 8
