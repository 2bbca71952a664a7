"""One rank of Megatron-core in this process, with a group of its own that is closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from strategies import hf
from strategies.megatron import MegatronStrategy, network
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=60,
    max_position_embeddings=16,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=4, learning_rate=1e-2, seed=3)


@pytest.fixture(scope="session")
def tiny() -> tuple[ModelSpec, TrainingSpec]:
    """A model whose vocabulary has to be padded, and how it trains."""
    return MODEL, TRAINING


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its seeded start as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("weights")
    hf.create_weights(MODEL, TRAINING, folder)
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    """Close the group that a single rank opens, so that no later test finds it."""
    yield
    network.leave_groups()  # a failed test did not
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def start(alone: None, tiny_weights: Path) -> Callable[..., MegatronStrategy]:
    """`start(zero_stage=0)`: a strategy at its seeded start; one at a time, who asked for it tears it down."""

    def start(zero_stage: int = 0) -> MegatronStrategy:
        plan = Plan(
            strategy="megatron",
            dp=1,
            micro_batch_size=2,
            num_microbatches=2,
            precision="fp32",
            zero_stage=zero_stage,
        )
        strategy = MegatronStrategy()
        strategy.setup(plan, MODEL, TRAINING, tiny_weights)
        return strategy

    return start


@pytest.fixture
def losses() -> Callable[..., list[float]]:
    """`losses(strategy, steps=1)`: train on one and the same batch, and say what each step's loss was."""
    draw = np.random.default_rng(5)
    batches: Any = [draw.integers(0, 60, (2, 9)) for _ in range(2)]

    def losses(strategy: MegatronStrategy, steps: int = 1) -> list[float]:
        return [strategy.train_step(batches, learning_rate=1e-2).loss for _ in range(steps)]

    return losses
