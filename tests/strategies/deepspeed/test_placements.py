"""Names and places of parameters that AutoTP and AutoEP have cut; the layers themselves are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

from strategies.deepspeed.boxes import Placement
from strategies.deepspeed.placements import placements_of


def network(*, tied: bool = False, **modules: torch.nn.Module) -> Any:
    """A part of a model, with the facts of transformers that are asked for."""
    found: Any = torch.nn.Module()
    for name, module in modules.items():
        found.add_module(name, module)
    found.config = SimpleNamespace(tie_word_embeddings=tied)
    found._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    return found


def linear(rows: int, columns: int) -> torch.nn.Linear:
    return torch.nn.Linear(columns, rows, bias=False)


def test_what_every_rank_has_whole_the_first_one_writes() -> None:
    engine = SimpleNamespace(module=network(norm=linear(4, 2)))
    for rank in (0, 1):
        found = placements_of(engine, tp_rank=rank)["norm.weight"]
        assert found == Placement(name="norm.weight", shape=(4, 2), shift=(0, 0), is_copy=rank > 0)


def test_parts_lie_behind_those_of_the_ranks_before() -> None:
    part = linear(4, 3)
    meta = {"partition_dim": 1, "partition_sizes": (3, 2), "logical_shape": (4, 5)}
    setattr(part.weight, DS_AUTOTP_UC_META, meta)
    engine = SimpleNamespace(module=network(down=part))
    found = placements_of(engine, tp_rank=1)["down.weight"]
    assert found == Placement(name="down.weight", shape=(4, 5), shift=(0, 3))


def test_a_tied_head_of_another_stage_is_a_copy() -> None:
    untied, tied = (network(tied=tied, lm_head=linear(6, 2)) for tied in (False, True))
    found = placements_of(SimpleNamespace(module=untied), tp_rank=0)["lm_head.weight"]
    assert found == Placement(name="lm_head.weight", shape=(6, 2), shift=(0, 0))
    pipeline: Any = tied
    pipeline.network = tied
    found = placements_of(SimpleNamespace(module=pipeline), tp_rank=0)["lm_head.weight"]
    assert found == Placement(name="model.embed_tokens.weight", shape=(6, 2), shift=(0, 0), is_copy=True)


def test_experts_take_their_rows_of_transformers_stacks() -> None:
    layer: Any = torch.nn.Module()
    layer._is_autoep_layer, layer.ep_rank, layer.num_local_experts, layer.num_experts = True, 1, 2, 4
    layer.router, layer.experts = torch.nn.Module(), torch.nn.Module()
    layer.router.gate = linear(4, 3)
    for name, shape in {"w1": (2, 5, 3), "w2": (2, 3, 5), "w3": (2, 5, 3)}.items():
        setattr(layer.experts, name, torch.nn.Parameter(torch.zeros(shape)))
    found = placements_of(SimpleNamespace(module=network(mlp=layer)), tp_rank=0)
    stack, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    assert found == {
        "mlp.router.gate.weight": Placement(name="mlp.gate.weight", shape=(4, 3), shift=(0, 0)),
        "mlp.experts.w1": Placement(name=stack, shape=(4, 10, 3), shift=(2, 0, 0)),
        "mlp.experts.w3": Placement(name=stack, shape=(4, 10, 3), shift=(2, 5, 0)),
        "mlp.experts.w2": Placement(name=down, shape=(4, 3, 5), shift=(2, 0, 0)),
    }


def test_shapes_that_zero_has_taken_away_are_remembered() -> None:
    part: Any = linear(4, 2)
    part.weight.data = torch.empty(0)
    part.weight.ds_shape = torch.Size((4, 2))
    found = placements_of(SimpleNamespace(module=network(norm=part)), tp_rank=0)
    assert found["norm.weight"].shape == (4, 2)
