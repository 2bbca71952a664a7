"""What the adapters do to their process, on one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strategies import process
from strategies.spec import TrainingSpec

TRAINING = TrainingSpec(sequence_length=8, global_batch_size=2, num_steps=2, seed=5)


def test_deterministic_is_switched_on_only_when_asked() -> None:
    process.set_deterministic(TRAINING)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        process.set_deterministic(replace(TRAINING, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_ranks_draw_different_numbers_and_repeat_them() -> None:
    process.seed_everything(TRAINING, rank=0)
    first = torch.rand(3)
    process.seed_everything(TRAINING, rank=1)
    other = torch.rand(3)
    process.seed_everything(TRAINING, rank=0)
    assert torch.equal(torch.rand(3), first)
    assert not torch.equal(first, other)


def test_losses_are_averaged_over_micro_batches() -> None:
    assert process.mean_of([torch.tensor(1.0), torch.tensor(4.0)]) == 2.5
    assert process.means_of([torch.tensor(1.0), torch.tensor(4.0)]) == (2.5, 2.5)
    assert process.own_mean([torch.tensor(1.0), torch.tensor(4.0)]) == 2.5


def test_a_rank_without_losses_has_no_mean() -> None:
    assert process.own_mean([]) is None


@pytest.mark.parametrize(("cuda", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_a_single_rank_reduces_where_its_tensors_are(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, backend: str
) -> None:
    opened: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda name, **_: opened.append(name))
    process.join_single_rank_group()
    assert opened == [backend]
