"""Tensors without memory in a world that is not there: what is counted, and what is answered for values."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist

from strategies import fake_world as subject
from strategies.fake_world import (
    create_state,
    empty_batches,
    fake_world,
    follow,
    optimizer_state,
    storage_bytes,
)
from strategies.spec import Plan, TrainingSpec

MIB = 2**20


def test_one_process_is_any_rank_and_leaves_no_group_behind() -> None:
    with fake_world(rank=5, world_size=8):
        assert (dist.get_rank(), dist.get_world_size()) == (5, 8)
        parts = [torch.empty(4) for _ in range(8)]
        dist.all_gather(parts, torch.empty(4))
        found: list[str] = [""] * 8
        dist.all_gather_object(found, "mine")
        assert found == ["mine"] * 8
    assert not dist.is_initialized()


def test_the_ledger_follows_storages_from_birth_to_death() -> None:
    with fake_world(rank=0, world_size=1) as ledger:
        before = ledger.live_bytes
        large = torch.empty(MIB, dtype=torch.float32)
        view = large[: MIB // 2]
        assert ledger.live_bytes - before == 4 * MIB, "a view is no second storage"
        del large
        assert ledger.live_bytes - before == 4 * MIB, "the view keeps it"
        del view
        gc.collect()
        assert (ledger.live_bytes - before, ledger.peak_bytes - before) == (0, 4 * MIB)
        ledger.restart()
        assert ledger.peak_bytes == ledger.live_bytes


def test_a_storage_that_is_emptied_and_refilled_counts_as_it_is() -> None:
    with fake_world(rank=0, world_size=1) as ledger:
        gathered = torch.empty(MIB, dtype=torch.float32)
        before = ledger.live_bytes
        gathered.untyped_storage().resize_(0)
        assert ledger.live_bytes - before == -4 * MIB
        gathered.untyped_storage().resize_(4 * MIB)
        assert ledger.live_bytes == before


def test_values_are_answered_so_that_a_step_goes_on() -> None:
    with fake_world(rank=0, world_size=1):
        assert float(torch.empty(3).norm()) == 1.0
        assert not bool(torch.empty(3).isnan().any())
        assert int(torch.tensor(7)) == 7, "what a number was made of is still known"


def test_a_step_that_depends_on_values_is_said_and_not_raised() -> None:
    with fake_world(rank=0, world_size=1) as ledger:
        [sentence] = follow(ledger, lambda: torch.empty(3).nonzero())
        assert "the engine asks for values" in sentence
        assert follow(ledger, lambda: torch.empty(3)) == ()
        with pytest.raises(RuntimeError, match="reduction dim"):
            follow(ledger, lambda: torch.empty(3, 4) @ torch.empty(5, 6))


def test_bytes_are_counted_by_storage() -> None:
    whole = torch.zeros(10)
    assert storage_bytes([whole, whole[:3], torch.zeros(2, dtype=torch.float64)]) == 40 + 16


def test_an_optimizer_makes_its_state_without_a_step() -> None:
    with fake_world(rank=0, world_size=1):
        layer = torch.nn.Linear(8, 8, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters())
        create_state(optimizer)
        moments = [tensor for tensor in optimizer_state(optimizer) if tensor.dim()]
        assert storage_bytes(moments) == 2 * 4 * 64
        assert layer.weight.grad is None


def test_modules_change_type_although_their_parameters_are_fakes() -> None:
    with fake_world(rank=0, world_size=1):
        layer = torch.nn.Linear(8, 8)
        weight = layer.weight
        layer.to(torch.bfloat16)
        assert layer.weight is weight and weight.dtype is torch.bfloat16


def test_batches_have_the_shape_of_a_step() -> None:
    training = TrainingSpec(sequence_length=16, global_batch_size=6, num_steps=1)
    batches = empty_batches(Plan(strategy="x", dp=1, micro_batch_size=2, num_microbatches=3), training)
    assert [batch.shape for batch in batches] == [(2, 17)] * 3


def test_nothing_stays_replaced() -> None:
    kept = (torch.nn.Module._apply, torch.UntypedStorage.resize_, torch.get_rng_state)
    with fake_world(rank=0, world_size=2):
        assert torch.nn.Module._apply is subject._apply
    assert (torch.nn.Module._apply, torch.UntypedStorage.resize_, torch.get_rng_state) == kept
