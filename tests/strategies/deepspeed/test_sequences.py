"""Each rank's part of a sequence, and transformers' attention given back. What it computes: tests/integration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from strategies.spec import Plan


@pytest.mark.parametrize(("rank", "columns"), [(0, [0, 1]), (1, [2, 3]), (4, [0, 1]), (7, [6, 7])])
def test_neighbours_share_a_sequence(monkeypatch: pytest.MonkeyPatch, rank: int, columns: list[int]) -> None:
    from strategies.deepspeed import sequences

    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    tokens = torch.arange(16).reshape(2, 8)
    part = sequences.part(tokens, Plan(strategy="deepspeed", dp=2, cp=4))
    assert part.tolist() == tokens[:, columns].tolist()


def test_transformers_gets_its_attention_back() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from strategies.deepspeed import sequences

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *_: None
    sequences.restore_attention(SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa")))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
