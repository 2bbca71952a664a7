"""AccelerateStrategy on one process: no process group, exact resume, refusals. Two ranks: tests/integration."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strategies import hf
from strategies.accelerate import CAPABILITIES, AccelerateStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
    tied_embeddings=True,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=10, learning_rate=1e-2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    AccelerateStrategy.create_weights(MODEL, TRAINING, folder)
    return folder


@pytest.fixture
def started(weights: Path) -> Iterator[Any]:
    open_ones: list[AccelerateStrategy] = []

    def start(**changes: Any) -> AccelerateStrategy:
        for strategy in open_ones:
            strategy.teardown()
        strategy = AccelerateStrategy()
        plan = {"strategy": "accelerate", "dp": 1, "num_microbatches": 2, "precision": "fp32", **changes}
        open_ones[:] = []
        strategy.setup(Plan(**plan), MODEL, TRAINING, weights)
        open_ones.append(strategy)
        return strategy

    yield start
    for strategy in open_ones:
        strategy.teardown()


def batches(seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 32, (2, 2, 9)))


def steps(strategy: AccelerateStrategy, seeds: range) -> list[tuple[float, float]]:
    results = [strategy.train_step(batches(seed), learning_rate=1e-2) for seed in seeds]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_is_not_sharded(tmp_path: Path, stage: int) -> None:
    plan = Plan(strategy="accelerate", dp=1, zero_stage=stage, precision="fp32")
    with pytest.raises(ValueError, match=f"accelerate cannot shard plan.zero_stage={stage} over a single"):
        AccelerateStrategy().setup(plan, MODEL, TRAINING, tmp_path)


def test_one_rank_opens_no_process_group(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    strategy = started()
    assert not torch.distributed.is_initialized()
    assert strategy.dp_rank == 0
    losses = [loss for loss, _ in steps(strategy, range(3))]
    assert all(np.isfinite(losses))


def test_the_same_batch_is_learned(started: Any) -> None:
    strategy = started()
    values = [strategy.train_step(batches(0), learning_rate=1e-2).loss for _ in range(8)]
    assert values[-1] < values[0] - 0.2


def test_resume_is_exact(started: Any, tmp_path: Path) -> None:
    strategy = started()
    steps(strategy, range(3))
    strategy.save(tmp_path)
    unbroken = steps(strategy, range(3, 6))
    resumed = started()
    resumed.load(tmp_path)
    assert steps(resumed, range(3, 6)) == unbroken


def test_learning_rate_zero_moves_nothing(started: Any) -> None:
    strategy = started()
    before = strategy.evaluate(batches(9))
    strategy.train_step(batches(0), learning_rate=0.0)
    assert strategy.evaluate(batches(9)) == before


def test_evaluate_does_not_train(started: Any) -> None:
    strategy = started()
    assert strategy.evaluate(batches(1)) == strategy.evaluate(batches(1))


def test_teardown_gives_the_environment_back(weights: Path) -> None:
    hf.be_quiet()  # sets one variable for good
    before = dict(os.environ)
    strategy = AccelerateStrategy()
    plan = Plan(strategy="accelerate", dp=1, precision="fp32")
    strategy.setup(plan, MODEL, TRAINING, weights)
    strategy.teardown()
    assert dict(os.environ) == before


def test_an_unknown_engine_key_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    plan = Plan(strategy="accelerate", dp=1, engine={"dpp": {}})
    with pytest.raises(ValueError, match=r"unknown key 'strategy.engine.dpp'; did you mean 'ddp'\?"):
        AccelerateStrategy().setup(plan, MODEL, TRAINING, tmp_path)


def test_engine_keys_are_real_settings_of_accelerate() -> None:
    from dataclasses import fields

    from accelerate import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

    known = {
        "ddp": {field.name for field in fields(DistributedDataParallelKwargs)},
        "fsdp": {field.name for field in fields(FullyShardedDataParallelPlugin)},
    }
    for section, names in known.items():
        assert set(CAPABILITIES.engine_keys[section]) <= names
    owned = [key.removeprefix("fsdp.") for key in CAPABILITIES.owned_engine_keys if key.startswith("fsdp.")]
    assert set(owned) <= known["fsdp"]


def test_capabilities_need_no_torch() -> None:
    code = (
        "import sys, strategies\n"
        "for name in strategies.ADAPTERS: strategies.load(name).capabilities\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_snapshot_is_of_the_moment_it_was_taken(started: Any, tmp_path: Path) -> None:
    strategy = started()
    steps(strategy, range(2))
    write = strategy.snapshot(tmp_path / "first")
    unbroken = steps(strategy, range(2, 4))  # training goes on before a byte is written
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    # The memory of the first copy serves the second one too.
    write = strategy.snapshot(tmp_path / "second")
    write()
    resumed = started()
    resumed.load(tmp_path / "first")
    assert steps(resumed, range(2, 4)) == unbroken
    resumed = started()
    resumed.load(tmp_path / "second")
    assert steps(resumed, range(2, 4)) != unbroken


def test_a_snapshot_takes_what_it_says(started: Any) -> None:
    strategy = started()
    steps(strategy, range(1))
    numbers = sum(parameter.numel() for parameter in strategy._model.parameters())
    num_parameters = len(list(strategy._model.parameters()))
    # fp32 weights and two moments, and a counter a parameter.
    assert strategy.snapshot_bytes() == pytest.approx(12 * numbers + 4 * num_parameters, rel=0.25)
