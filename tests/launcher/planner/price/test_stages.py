"""Which layers and parameters lie on which pipeline stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.planner.price.stages import (
    StageShape,
    expert_replicas,
    owned_parameters,
    stage_layers,
    stages_of,
)
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan

GPT = ModelSpec(
    name="gpt",
    model_type="gpt2",
    num_layers=8,
    hidden_size=1024,
    num_attention_heads=16,
    ffn_hidden_size=4096,
    vocab_size=5000,
    max_position_embeddings=2048,
    gated_mlp=False,
    norm="layernorm",
)
MOE = replace(GPT, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=512, num_dense_layers=2))


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1, "num_microbatches": 8}
    return Plan(**(defaults | values))


def parameters(stage: StageShape) -> float:
    return stage.parameters + stage.expert_parameters


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize(
    "model", [GPT, MOE, replace(GPT, tied_embeddings=True)], ids=["dense", "moe", "tied"]
)
def test_stages_hold_all_parameters_between_them(model: ModelSpec, pp: int) -> None:
    plan = plan_of(pp=pp)
    first, last = stages_of(model, plan)[0], stages_of(model, plan)[-1]
    if pp == 1:
        copies = 0
        found = parameters(first)
    else:
        copies = model.vocab_size * model.hidden_size if model.tied_embeddings else 0
        experts = model.moe.num_experts if model.moe else 0
        middle = (pp - 2) * model.num_layers // pp * model.moe_layer_parameters(experts)
        found = parameters(first) + parameters(last) + middle
    # The final norm is left out.
    assert found == pytest.approx(model.num_parameters + copies, abs=2 * model.hidden_size)


def test_experts_are_divided_by_ep_and_etp_and_not_by_tp() -> None:
    whole = stages_of(MOE, plan_of(dp=8))[0]
    split = stages_of(MOE, plan_of(dp=4, tp=2, ep=4))[0]
    assert split.expert_parameters == pytest.approx(whole.expert_parameters / 4)
    assert stages_of(MOE, plan_of(dp=4, tp=2, ep=4, etp=2))[0].expert_parameters == pytest.approx(
        whole.expert_parameters / 8
    )
    assert split.parameters < whole.parameters


def test_ranks_that_hold_the_same_experts() -> None:
    assert expert_replicas(plan_of(dp=8)) == 8
    assert expert_replicas(plan_of(dp=8, tp=2, ep=4)) == 4
    assert expert_replicas(plan_of(dp=2, ep=4)) == 1


def test_a_middle_stage_of_experts_is_looked_at() -> None:
    shapes = stages_of(MOE, plan_of(pp=4))
    assert [shape.index for shape in shapes] == [0, 1, 3]
    assert shapes[0].dense_layers == 2
    assert shapes[1].moe_layers == 2


def test_layers_that_do_not_divide_go_to_the_middle() -> None:
    assert [layers for layers, _ in stage_layers(replace(GPT, num_layers=10), plan_of(pp=4))] == [2, 3, 3, 2]


def test_a_given_split_is_followed_chunk_by_chunk() -> None:
    """Chunk c of stage s is the (c * pp + s)-th of the model."""
    plan = plan_of(pp=2, vp=2, pipeline_split=(1, 3, 3, 1))
    assert stage_layers(GPT, plan) == [(4, 0), (4, 0)]
    assert stage_layers(MOE, plan) == [(1, 3), (1, 3)]  # the two dense layers come first
    lopsided = stages_of(GPT, plan_of(pp=2, pipeline_split=(2, 6)))
    assert [shape.num_layers for shape in lopsided] == [2, 6]
    assert (lopsided[0].has_embedding, lopsided[0].has_head) == (True, False)
    assert (lopsided[1].has_embedding, lopsided[1].has_head) == (False, True)


def test_experts_that_are_not_cut_leave_whole_ones_on_the_fullest_rank() -> None:
    plan = plan_of(dp=16)
    shape = next(shape for shape in stages_of(MOE, plan) if shape.expert_parameters)
    assert MOE.moe is not None
    even = owned_parameters(shape, plan)
    for pieces, share in ((64, 1 / 16), (16, 1 / 16), (8, 1 / 8), (24, 2 / 24)):
        whole = owned_parameters(replace(shape, expert_pieces=pieces), plan)
        assert whole - even == pytest.approx(shape.expert_parameters * (share - 1 / 16))
