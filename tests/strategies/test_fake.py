"""FakeStrategy: falls, depends on the data, resumes exactly, needs no torch."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from strategies.fake import FakeStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    ffn_hidden_size=16,
    vocab_size=32,
    max_position_embeddings=16,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=2, num_steps=10)


def started(**plan: object) -> FakeStrategy:
    strategy = FakeStrategy()
    strategy.setup(Plan(strategy="fake", **{"dp": 1, **plan}), MODEL, TRAINING, Path("unused"))  # type: ignore[arg-type]
    return strategy


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32, (1, 9))


def losses(strategy: FakeStrategy, seeds: range) -> list[float]:
    return [strategy.train_step([batch(seed)], learning_rate=1e-3).loss for seed in seeds]


def test_loss_falls_at_every_step() -> None:
    values = losses(started(), range(200))
    assert all(later < earlier for earlier, later in pairwise(values))


def test_loss_depends_on_the_data_seen_before() -> None:
    one, other = started(), started()
    one.train_step([batch(1)], learning_rate=1e-3)
    other.train_step([batch(2)], learning_rate=1e-3)
    assert losses(one, range(3, 5)) != losses(other, range(3, 5))


def test_resume_is_exact(tmp_path: Path) -> None:
    unbroken = started()
    losses(unbroken, range(5))
    unbroken.save(tmp_path)
    resumed = started()
    resumed.load(tmp_path)
    assert losses(resumed, range(5, 10)) == losses(unbroken, range(5, 10))


def test_evaluate_leaves_training_alone() -> None:
    one, other = started(), started()
    one.evaluate([batch(7)])
    assert losses(one, range(3)) == losses(other, range(3))


def test_number_of_batches_is_checked() -> None:
    with pytest.raises(AssertionError):
        started(num_microbatches=2).train_step([batch(0)], learning_rate=1e-3)


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (7, 1)])
def test_dp_rank_follows_the_rank_order(monkeypatch: pytest.MonkeyPatch, rank: int, expected: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    assert started(dp=2, tp=2, pp=2).dp_rank == expected


def test_every_rank_writes_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        started(dp=2).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-00000.json", "rank-00001.json"]


def test_torch_is_never_imported() -> None:
    code = "import sys, strategies; strategies.load('fake'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
