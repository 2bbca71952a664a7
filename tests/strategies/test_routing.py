"""What is counted of routers, by hand and where a model is made to choose the same experts always."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from strategies import hf, routing
from strategies.accelerate import AccelerateStrategy
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="mixtral",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
    moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=32),
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=2)
INDICES = torch.tensor([[0, 1], [0, 2], [0, 3]])


@pytest.mark.parametrize(
    "output",
    [
        (torch.rand(3, 4), torch.rand(3, 2), INDICES),  # transformers
        (torch.rand(3, 2), INDICES, torch.zeros(4, dtype=torch.int32)),  # AutoEP
        (torch.rand(3, 4), torch.zeros(3, 4).scatter(1, INDICES, 1.0).bool()),  # Megatron-core
    ],
)
def test_every_engines_routers_are_understood(output: tuple[torch.Tensor, ...]) -> None:
    assert routing.choices(output, num_experts=4).tolist() == [3, 1, 1, 1]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_skewed_router_shows(tmp_path: Path, recompute: str) -> None:
    hf.create_weights(MODEL, TRAINING, tmp_path)
    strategy = AccelerateStrategy()
    plan = Plan(strategy="accelerate", dp=1, num_microbatches=2, precision="fp32", recompute=recompute)
    strategy.setup(plan, MODEL, TRAINING, tmp_path)
    batches = list(np.random.default_rng(0).integers(0, 32, (2, 2, 9)))
    with torch.no_grad():
        # The second layer gives nobody a preference, and so everything to the same two.
        strategy._model.model.layers[1].mlp.gate.weight.zero_()
    with strategy.counting_experts() as tokens:
        strategy.train_step(batches, learning_rate=0.0)
    times, chosen = 1 + (recompute == "full"), 2 * 32
    assert {sum(counts) for counts in tokens.values()} == {times * chosen}
    assert max(tokens[0]) < times * 32
    assert sorted(tokens[1]) == [0, 0, times * 32, times * 32]
    strategy.train_step(batches, learning_rate=0.0)  # nobody watches any more
    assert sum(tokens[0]) == times * chosen
    strategy.teardown()


def test_a_model_without_experts_has_no_routers() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert routing.routers_of([network]) == {}
