"""One rank of Megatron-core behind the interface; what takes several ranks is in tests/integration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies import hf
from strategies.megatron import MegatronStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

Tiny = tuple[ModelSpec, TrainingSpec]
# Upstream's advice to itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
PLAN = Plan(strategy="megatron", dp=1, micro_batch_size=2, num_microbatches=2, precision="fp32")


def batches(count: int = 2) -> list[Any]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, 60, (2, 9)) for _ in range(count)]


@pytest.mark.usefixtures("alone")
def test_it_learns_and_evaluates_what_transformers_does(tiny: Tiny, tiny_weights: Path) -> None:
    import torch

    model, training = tiny
    strategy = MegatronStrategy()
    strategy.setup(PLAN, model, training, tiny_weights)
    network = hf.build_model(tiny_weights, model)
    with torch.no_grad():
        expected = [float(hf.model_loss(network, batch, torch.device("cpu"))) for batch in batches()]
    assert strategy.evaluate(batches()) == pytest.approx(np.mean(expected), rel=1e-5)
    losses = [strategy.train_step(batches(), learning_rate=1e-2).loss for _ in range(4)]
    assert losses[0] == pytest.approx(np.mean(expected), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    strategy.teardown()


@pytest.mark.usefixtures("alone")
def test_two_plans_after_each_other_in_one_process(tiny: Tiny, tiny_weights: Path) -> None:
    losses = []
    for zero_stage in (0, 1):
        strategy = MegatronStrategy()
        strategy.setup(replace(PLAN, zero_stage=zero_stage), *tiny, tiny_weights)
        losses.append([strategy.train_step(batches(), learning_rate=1e-2).loss for _ in range(3)])
        strategy.teardown()
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"precision": "fp8"}, r"training\.precision=fp8 needs Transformer Engine on a GPU"),
        ({"zero_stage": 2}, r"megatron has no plan\.zero_stage=2; use one of 0, 1"),
        (
            {"engine": {"transformer": {"bf16": True}}},
            r"strategy\.engine\.transformer\.bf16=True is decided by",
        ),
        (
            {"engine": {"ddp": {"bucketsize": 1}}},
            r"unknown key 'strategy\.engine\.ddp\.bucketsize'; did you mean",
        ),
    ],
)
@pytest.mark.usefixtures("alone")
def test_what_cannot_be_is_refused_in_a_sentence(
    tiny: Tiny, tiny_weights: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        MegatronStrategy().setup(replace(PLAN, **changes), *tiny, tiny_weights)


def test_weights_of_another_model_are_refused(tiny: Tiny, tiny_weights: Path) -> None:
    model, training = tiny
    with pytest.raises(ValueError, match=r"model\.num_layers=3 does not match 2"):
        MegatronStrategy().setup(PLAN, replace(model, num_layers=3), training, tiny_weights)
