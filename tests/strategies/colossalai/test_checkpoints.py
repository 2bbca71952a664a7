"""Files of a rank: who writes which, and what comes back. The engine's own optimizers: tests/integration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies.colossalai import checkpoints
from strategies.colossalai.checkpoints import Place


def boosted(seed: int) -> tuple[Any, Any]:
    """Stand-ins for what Booster.boost returns: a wrapper around the model, and one around torch's optimizer."""
    torch.manual_seed(seed)
    network = torch.nn.Linear(4, 3)
    master = [torch.nn.Parameter(p.detach().double().clone()) for p in network.parameters()]
    adam = torch.optim.AdamW(master, lr=1e-2)
    for parameter in master:
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    return SimpleNamespace(unwrap=lambda: network), SimpleNamespace(optim=adam)


def place(*, dp: int, sharded: bool) -> Place:
    return Place(tp=1, pp=2, dp=dp, sharded=sharded)


def tensors(model: Any, optimizer: Any) -> list[torch.Tensor]:
    state = optimizer.optim.state_dict()["state"]
    moments = [value for entry in state.values() for value in entry.values()]
    master = optimizer.optim.param_groups[0]["params"]
    return [*(p.detach() for p in model.unwrap().parameters()), *(p.detach() for p in master), *moments]


@pytest.mark.parametrize("sharded", [False, True])
def test_everything_comes_back(tmp_path: Path, sharded: bool) -> None:
    saved, fresh = boosted(0), boosted(1)
    checkpoints.save(tmp_path, *saved, place(dp=0, sharded=sharded))
    checkpoints.load(tmp_path, *fresh, place(dp=0, sharded=sharded))
    for ours, theirs in zip(tensors(*fresh), tensors(*saved), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("dp", "sharded", "files"),
    [
        (0, False, {"weights_tp0001_pp0002.pt", "optimizer_tp0001_pp0002_dp00000.pt"}),
        (1, False, set()),
        (0, True, {"weights_tp0001_pp0002.pt", "optimizer_tp0001_pp0002_dp00000.pt"}),
        (1, True, {"optimizer_tp0001_pp0002_dp00001.pt"}),
    ],
)
def test_nothing_is_written_twice(tmp_path: Path, dp: int, sharded: bool, files: set[str]) -> None:
    checkpoints.save(tmp_path, *boosted(0), place(dp=dp, sharded=sharded))
    assert {file.name for file in tmp_path.iterdir()} == files


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"weights_tp0001_pp0002.pt is missing; this checkpoint was written under"
    ):
        checkpoints.load(tmp_path, *boosted(0), place(dp=0, sharded=True))


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    model, optimizer = boosted(0)
    checkpoints.save(tmp_path, model, optimizer, place(dp=0, sharded=False))
    other = SimpleNamespace(unwrap=lambda: torch.nn.Linear(4, 3, bias=False))
    with pytest.raises(RuntimeError, match="holds other tensors than this plan"):
        checkpoints.load(tmp_path, other, optimizer, place(dp=0, sharded=False))
