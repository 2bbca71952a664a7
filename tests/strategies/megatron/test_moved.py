"""Names of what Megatron-core's optimizer moves. Plans on real ranks: tests/integration/test_parity_megatron.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strategies.megatron import MegatronStrategy, moved
from strategies.megatron.weights import parameters_of
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

PLAN = Plan(strategy="megatron", dp=1, micro_batch_size=2, num_microbatches=2, precision="fp32")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("changes", [{}, {"zero_stage": 1}, {"precision": "bf16"}])
def test_every_moved_tensor_has_the_name_of_its_parameter(
    tiny: tuple[ModelSpec, TrainingSpec], tiny_weights: Path, changes: dict[str, Any]
) -> None:
    strategy = MegatronStrategy()
    strategy.setup(replace(PLAN, **changes), *tiny, tiny_weights)
    names = moved.names_of(strategy._chunks, strategy._optimizer, sharded=changes.get("zero_stage", 0) > 0)
    (optimizer,) = moved.optimizers_of(strategy._optimizer)
    sizes = {
        names[id(tensor)]: tensor.numel() for group in optimizer.param_groups for tensor in group["params"]
    }
    whole = {name: parameter.numel() for name, parameter in parameters_of(strategy._chunks).items()}
    assert sizes == whole
    strategy.teardown()
