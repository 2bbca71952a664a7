"""What a rank holds, read off stand-ins for engines; DeepSpeed: tests/integration/test_reshard_deepspeed.py."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies.deepspeed.boxes import Placement
from strategies.deepspeed.holdings import (
    WEIGHT,
    Reader,
    ShardedHoldings,
    SplitHoldings,
    WholeHoldings,
    holdings_of,
)


def placements(module: torch.nn.Module) -> dict[str, Placement]:
    return {
        name: Placement(name=name, shape=tuple(parameter.shape), shift=(0,) * parameter.ndim)
        for name, parameter in module.named_parameters()
    }


def plain_engine() -> Any:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    return SimpleNamespace(
        module=module, optimizer=optimizer, device=torch.device("cpu"), zero_optimization_stage=lambda: 0
    )


def split_engine() -> Any:
    """Rank 1 of 2: the flat tensor of 8 elements is cut in the middle of the weight's second row."""
    engine = plain_engine()
    flat = torch.nn.Parameter(torch.arange(4.0))
    links = {"weight": (4, 2, 0), "bias": (0, 2, 2)}
    for name, parameter in engine.module.named_parameters():
        start, numel, offset = links[name]
        parameter._hp_mapping = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=start, numel=numel),
            hp_fragment_address=SimpleNamespace(start=offset, numel=numel),
            param_group_index=0,
        )
    inner = torch.optim.AdamW([flat])
    updated: list[bool] = []
    engine.optimizer = SimpleNamespace(optimizer=inner, update_lp_params=lambda: updated.append(True))
    engine.updated, engine.zero_optimization_stage = updated, lambda: 1
    return engine


def test_without_zero_parameters_are_their_own_groups() -> None:
    engine = plain_engine()
    holdings = holdings_of(engine, placements(engine.module))
    assert isinstance(holdings, WholeHoldings)
    found = {piece.placement.name: piece for piece in holdings.pieces()}
    assert found["weight"].target.sizes == (2, 3)
    view = found["weight"].of(holdings.flat(WEIGHT, found["weight"].group))
    assert torch.equal(view, engine.module.weight.detach())
    view.fill_(7)
    assert torch.equal(engine.module.weight.detach(), torch.full((2, 3), 7.0))


def test_what_the_optimizer_moves_is_named_and_copies_are_not() -> None:
    engine, cut = plain_engine(), split_engine()
    whole = WholeHoldings(engine, placements(engine.module))
    weight, bias = engine.module.weight, engine.module.bias
    assert whole.parts(first=True) == {id(weight): {"weight": (0, 6)}, id(bias): {"bias": (0, 2)}}
    assert whole.parts(first=False) == {}
    assert whole.optimizers() == [engine.optimizer]
    split = SplitHoldings(cut, placements(cut.module))
    (flat,) = cut.optimizer.optimizer.param_groups[0]["params"]
    assert split.parts(first=False) == {id(flat): {"weight": (0, 2), "bias": (2, 2)}}
    copied = {name: replace(place, is_copy=name == "bias") for name, place in placements(cut.module).items()}
    assert SplitHoldings(cut, copied).parts(first=True) == {id(flat): {"weight": (0, 2)}}


def test_a_cut_tensor_is_named_block_by_block() -> None:
    engine = split_engine()
    holdings = holdings_of(engine, placements(engine.module))
    assert isinstance(holdings, SplitHoldings)
    blocks = [
        (piece.placement.name, piece.target.offsets, piece.of(holdings.flat(WEIGHT, 0)).flatten().tolist())
        for piece in holdings.pieces()
    ]
    assert blocks == [("weight", (1, 1), [0.0, 1.0]), ("bias", (0,), [2.0, 3.0])]
    holdings.finish()
    assert engine.updated == [True]


def test_moments_are_made_where_no_step_was_made_yet() -> None:
    engine = split_engine()
    holdings = holdings_of(engine, placements(engine.module))
    assert holdings.step_count() == 0
    assert holdings.flat("exp_avg", 0).tolist() == [0.0] * 4
    holdings.set_step_count(0, 5)
    assert holdings.step_count() == 5
    [flat] = engine.optimizer.optimizer.param_groups[0]["params"]
    assert float(engine.optimizer.optimizer.state[flat]["step"]) == 5


def test_a_plain_count_of_steps_stays_one() -> None:
    engine = split_engine()
    holdings = holdings_of(engine, placements(engine.module))
    holdings.flat("exp_avg", 0)
    [flat] = engine.optimizer.optimizer.param_groups[0]["params"]
    engine.optimizer.optimizer.state[flat]["step"] = 3  # as DeepSpeed's own Adam counts
    holdings.set_step_count(0, 9)
    assert engine.optimizer.optimizer.state[flat]["step"] == 9


def test_groups_are_opened_one_after_the_other() -> None:
    engine = plain_engine()
    holdings = holdings_of(engine, placements(engine.module))
    seen: list[str] = []

    @contextmanager
    def opened(group: int, *, writing: bool = False) -> Any:
        seen.append(f"open {group}")
        yield
        seen.append(f"close {group}")

    holdings.opened = opened  # type: ignore[method-assign, assignment]
    with Reader(holdings) as reader:
        for piece in holdings.pieces():
            reader.read(WEIGHT, piece)
            reader.read("exp_avg", piece)
    assert seen == ["open 0", "close 0", "open 1", "close 1"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_groups_on_a_disk_are_taken_alone(on_disk: bool) -> None:
    optimizer = SimpleNamespace(
        fp16_groups=[[], [], []],
        grad_position={},
        _swappable_optimizer_subgroup=lambda group: on_disk,
    )
    engine = SimpleNamespace(module=torch.nn.Module(), optimizer=optimizer, zero_optimization_stage=lambda: 3)
    holdings = holdings_of(engine, {})
    assert isinstance(holdings, ShardedHoldings)
    assert holdings.batches() == ([(0,), (1,), (2,)] if on_disk else [(0, 1, 2)])
