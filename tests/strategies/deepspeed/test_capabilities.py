"""What the planner may ask of DeepSpeed."""

from __future__ import annotations

import pytest

from strategies.deepspeed import CAPABILITIES
from strategies.spec import Plan


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offload_is_offered_where_deepspeed_has_it(stage: int) -> None:
    optimizer = Plan(strategy="deepspeed", dp=2, zero_stage=stage, offload_optimizer=True)
    parameters = Plan(strategy="deepspeed", dp=2, zero_stage=stage, offload_parameters=True)
    assert (CAPABILITIES.why_not(optimizer) is None) is (stage > 0)
    assert (CAPABILITIES.why_not(parameters) is None) is (stage == 3)
