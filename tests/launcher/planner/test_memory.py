"""Bytes per rank against published formulas and tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.planner.cost import MemoryCost
from launcher.planner.memory import (
    layer_activation_bytes,
    micro_batches_in_flight,
    stage_memory,
)
from launcher.planner.stages import stages_of
from strategies.base import StateBytes
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

# GPT-3's proportions: Korthikanti et al. 2022 state their formulas for plain MLPs of width 4h and LayerNorm.
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
TRAINING = TrainingSpec(sequence_length=2048, global_batch_size=64, num_steps=10)
STATE = StateBytes(weights=2, gradients=2, optimizer=12)


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1, "num_microbatches": 8}
    return Plan(**(defaults | values))


def memory(model: ModelSpec, plan: Plan, *, state: StateBytes = STATE, stage: int = 0) -> MemoryCost:
    shape = stages_of(model, plan)[stage]
    return stage_memory(model, plan=plan, training=TRAINING, state=state, stage=shape)[0]


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (4, False), (4, True)])
def test_activations_follow_korthikanti_without_dropout_and_scores(tp: int, sequence_parallel: bool) -> None:
    """Equations 2 and 4: s b h (10 + 24 / t) and s b h * 34 / t bytes, less 2 for the masks of two dropouts."""
    plan = plan_of(tp=tp, sequence_parallel=sequence_parallel, micro_batch_size=3)
    factor = 32 / tp if sequence_parallel else 8 + 24 / tp
    expected = TRAINING.sequence_length * 3 * GPT.hidden_size * factor
    found = layer_activation_bytes(GPT, plan=plan, training=TRAINING, moe=False)
    assert found == pytest.approx(expected)


def test_full_recomputation_keeps_layer_inputs_and_one_layer() -> None:
    plan = plan_of(recompute="full")
    layer_input = 2 * TRAINING.sequence_length * GPT.hidden_size  # Korthikanti, section 5: 2 s b h
    layer = layer_activation_bytes(GPT, plan=plan, training=TRAINING, moe=False)
    embedding = layer_input
    assert memory(GPT, plan).activations == pytest.approx(8 * layer_input + embedding + layer)


def test_states_match_the_example_of_the_zero_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 ranks are 120, 31.4, 16.6 and 1.9 GB."""
    model = replace(GPT, hidden_size=4096, ffn_hidden_size=16384, num_layers=37, vocab_size=128)
    scale = 7.5e9 / model.num_parameters
    expected = {0: 120, 1: 31.4, 2: 16.6, 3: 1.9}
    for stage, gigabytes in expected.items():
        cost = memory(model, plan_of(dp=64, zero_stage=stage))
        states = cost.weights + cost.gradients + cost.optimizer
        assert states * scale / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize(
    "model", [GPT, MOE, replace(GPT, tied_embeddings=True)], ids=["dense", "moe", "tied"]
)
def test_stages_hold_all_parameters_between_them(model: ModelSpec, pp: int) -> None:
    plan = plan_of(pp=pp)
    first, last = stages_of(model, plan)[0], stages_of(model, plan)[-1]
    if pp == 1:
        copies = 0
        found = first.parameters + first.expert_parameters
    else:
        copies = model.vocab_size * model.hidden_size if model.tied_embeddings else 0
        per_stage = model.num_layers // pp
        middle = (
            (pp - 2)
            * per_stage
            * (
                model.moe_layer_parameters(model.moe.num_experts)
                if model.moe
                else model.dense_layer_parameters
            )
        )
        found = first.parameters + first.expert_parameters + last.parameters + last.expert_parameters + middle
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


def test_a_middle_stage_of_experts_is_looked_at() -> None:
    lopsided = replace(MOE, moe=replace(MOE.moe, num_dense_layers=2) if MOE.moe else None)
    shapes = stages_of(lopsided, plan_of(pp=4))
    assert [shape.index for shape in shapes] == [0, 1, 3]
    assert shapes[0].dense_layers == 2
    assert shapes[1].moe_layers == 2


def test_micro_batches_in_flight() -> None:
    """1F1B: p - i at stage i (Narayanan et al. 2021, section 2.2.1); interleaved: 1 + (p - 1) / (p v) stages' worth."""
    one = plan_of(pp=4, num_microbatches=16)
    assert [micro_batches_in_flight(one, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(plan_of(pp=4, num_microbatches=2), 0) == 2
    interleaved = plan_of(pp=4, vp=2, num_microbatches=16)
    # Korthikanti et al. 2022, section 4.2.3: p (1 + (p - 1) / (p v)) micro-batches' layers on the first stage.
    assert micro_batches_in_flight(interleaved, 0) == pytest.approx(4 * (1 + 3 / (4 * 2)))
    assert micro_batches_in_flight(plan_of(), 0) == 1


def test_only_the_last_stage_holds_logits() -> None:
    plan = plan_of(pp=2)
    assert memory(GPT, plan, stage=0).logits == 0
    # bf16 logits, then fp32 copy, log-probabilities and gradient.
    assert memory(GPT, plan, stage=1).logits == pytest.approx(2048 * 5000 * (2 + 12))
    assert memory(GPT, replace(plan, precision="fp32"), stage=1).logits == pytest.approx(2048 * 5000 * 12)


def test_offload_moves_bytes_to_the_host() -> None:
    def both(plan: Plan) -> tuple[MemoryCost, float]:
        shape = stages_of(GPT, plan)[0]
        return stage_memory(GPT, plan=plan, training=TRAINING, state=STATE, stage=shape)

    resident, nothing = both(plan_of(dp=4, zero_stage=3))
    moved, host = both(plan_of(dp=4, zero_stage=3, offload_optimizer=True, offload_parameters=True))
    assert nothing == 0
    assert (moved.weights, moved.gradients, moved.optimizer) == (0, 0, 0)
    assert host == pytest.approx(resident.weights + resident.gradients + resident.optimizer)
    first, _ = both(plan_of(dp=4, zero_stage=1, offload_optimizer=True))
    assert first.optimizer == 0
    assert first.gradients > 0


def test_a_gathered_copy_is_whole_or_a_few_layers() -> None:
    whole = StateBytes(weights=4, gradients=4, optimizer=8, gathered=2, keep_gathered=True)
    shape = stages_of(GPT, plan_of())[0]
    assert memory(GPT, plan_of(), state=whole).buffers == pytest.approx(2 * shape.parameters)
    layered = replace(whole, keep_gathered=False)
    assert memory(GPT, plan_of(), state=layered).buffers < memory(GPT, plan_of(), state=whole).buffers


def test_smaller_pieces_need_less() -> None:
    base = memory(GPT, plan_of(micro_batch_size=2)).activations
    assert memory(GPT, plan_of(micro_batch_size=1)).activations == pytest.approx(base / 2)
    assert memory(GPT, plan_of(micro_batch_size=2, cp=2)).activations == pytest.approx(base / 2)
    assert memory(GPT, plan_of(micro_batch_size=2, tp=2)).activations < base
    assert memory(GPT, plan_of(micro_batch_size=2, recompute="full")).activations < base


def test_buckets_count_above_stage_zero_and_never_exceed_the_model() -> None:
    def buffers(stage: int, elements: int) -> float:
        plan = Plan(strategy="x", dp=2, zero_stage=stage, precision="fp32")
        shape = stages_of(GPT, plan)[0]
        cost, _ = stage_memory(
            GPT, plan=plan, training=TRAINING, state=STATE, stage=shape, bucket_elements=elements
        )
        return cost.buffers

    assert buffers(0, 1000) == buffers(0, 0)
    assert buffers(1, 1000) == buffers(1, 0) + 1000 * STATE.gradients
    assert buffers(1, 10**15) == buffers(1, 0) + GPT.num_parameters * STATE.gradients


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_kept_whole_are_not_sharded(stage: int) -> None:
    plan = plan_of(dp=8, zero_stage=stage)
    sharded, whole = memory(GPT, plan), memory(GPT, plan, state=replace(STATE, whole_gradients=True))
    assert whole.gradients == pytest.approx(8 * sharded.gradients)
    assert whole.buffers < sharded.buffers  # nothing further lives while it is reduced
    assert whole.optimizer == sharded.optimizer
