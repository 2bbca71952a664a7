"""DeepSpeed's estimates and the planner's: of the same model, in the same units."""

from __future__ import annotations

import pytest

from benchmarks.deepspeed_estimators import deepspeeds, largest_layer_parameters, planners, preset
from launcher.planner.cost import GIB
from strategies.spec import Plan


def test_both_count_the_same_weights() -> None:
    model = preset("llama3_8b")
    plan = Plan(strategy="deepspeed", dp=8, zero_stage=2, offload_optimizer=True)
    weights = pytest.approx(2 * model.num_parameters / GIB)
    assert deepspeeds(model, plan, nodes=1).device_gib == weights
    assert planners(model, plan, gpus_per_node=8).device_gib == weights


def test_a_rank_of_more_holds_less_and_its_host_the_rest() -> None:
    model = preset("llama3_8b")
    resident, offloaded = (
        planners(
            model, Plan(strategy="deepspeed", dp=8, zero_stage=3, offload_optimizer=moved), gpus_per_node=8
        )
        for moved in (False, True)
    )
    assert resident.host_gib == 0
    assert offloaded.device_gib < resident.device_gib
    assert offloaded.host_gib > 8 * (resident.device_gib - offloaded.device_gib)


def test_the_largest_layer_is_the_table_of_tokens() -> None:
    assert largest_layer_parameters(preset("llama3_8b")) == 128256 * 4096
