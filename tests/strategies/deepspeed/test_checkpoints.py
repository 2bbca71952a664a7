"""Blocks are written and found again; over several ranks and plans: tests/integration/test_reshard_deepspeed.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from strategies.deepspeed import checkpoints
from strategies.deepspeed.boxes import Placement
from strategies.deepspeed.holdings import Holdings, holdings_of


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def holdings(*, rows: int = 2, shift: int = 0, whole: int = 2, steps: int = 0) -> Holdings:
    """A matrix, of which `rows` rows from `shift` on are here; after some steps of Adam, and with a buffer."""
    torch.manual_seed(steps)
    module = torch.nn.Linear(3, rows, bias=False)
    module.register_buffer("bias_of_routes", torch.full((2,), float(steps)))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for _ in range(steps):
        module(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine: Any = SimpleNamespace(
        module=module, optimizer=optimizer, device=torch.device("cpu"), zero_optimization_stage=lambda: 0
    )
    return holdings_of(engine, {"weight": Placement(name="weight", shape=(whole, 3), shift=(shift, 0))})


def test_everything_comes_back(tmp_path: Path) -> None:
    trained, fresh = holdings(steps=3), holdings()
    checkpoints.save(trained, tmp_path)
    checkpoints.load(fresh, tmp_path)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(fresh.flat(kind, 0), trained.flat(kind, 0))
        assert fresh.flat(kind, 0).abs().sum() > 0
    assert fresh.step_count() == 3
    assert fresh.buffers()["bias_of_routes"].tolist() == [3.0, 3.0]


def test_every_snapshot_holds_its_own_moment(tmp_path: Path) -> None:
    snapshots, trained, fresh = checkpoints.Snapshots(), holdings(steps=1), holdings()
    assert (
        checkpoints.num_bytes(trained) == 3 * 4 * 6 + 4 * 2
    )  # three flat tensors of six elements, and the buffer
    kept = []
    for number in range(2):
        write = snapshots.take(trained, tmp_path / str(number))
        kept.append(trained.flat("weight", 0).clone())
        with torch.no_grad():
            trained.flat("weight", 0).add_(1)
            trained.buffers()["bias_of_routes"].add_(1)
        write()
    for number in (1, 0):
        checkpoints.load(fresh, tmp_path / str(number))
        assert torch.equal(fresh.flat("weight", 0), kept[number])
        assert fresh.buffers()["bias_of_routes"].tolist() == [1.0 + number] * 2
    assert not torch.equal(*kept)


def test_a_part_is_read_out_of_the_whole(tmp_path: Path) -> None:
    trained, part = holdings(rows=4, whole=4, steps=2), holdings(rows=2, shift=1, whole=4)
    checkpoints.save(trained, tmp_path)
    checkpoints.load(part, tmp_path)
    assert torch.equal(part.flat("exp_avg", 0).view(2, 3), trained.flat("exp_avg", 0).view(4, 3)[1:3])


def test_a_model_that_is_not_whole_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match=r"6 of 12 elements of weight\.weight are held"):
        checkpoints.save(holdings(rows=2, whole=4), tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints.save(holdings(), tmp_path)
    with pytest.raises(BaseException, match=r"holds no tensor 'weight.weight' of the shape \(4, 3\)"):
        checkpoints.load(holdings(rows=4, whole=4), tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match="holds no checkpoint that this release of strategy=deepspeed wrote"
    ):
        checkpoints.load(holdings(), tmp_path)
