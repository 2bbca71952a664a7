"""Bytes per rank against published formulas and tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

import strategies
from launcher.planner.cost import GIB, MemoryCost
from launcher.planner.price.activations import layer_bytes
from launcher.planner.price.memory import MemoryModel, micro_batches_in_flight, stage_memory
from launcher.planner.price.stages import stages_of
from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

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
FUSED = Execution(fused_kernels=True)
PLAIN = Execution()
MEGATRON = StateBytes(weights=2, gradients=4, optimizer=12, fresh_gradients=2)


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1, "num_microbatches": 8}
    return Plan(**(defaults | values))


def memory(
    model: ModelSpec,
    plan: Plan,
    *,
    state: StateBytes = STATE,
    stage: int = 0,
    execution: Execution = PLAIN,
    training: TrainingSpec = TRAINING,
) -> MemoryCost:
    shape = stages_of(model, plan)[stage]
    return stage_memory(model, plan=plan, training=training, state=state, stage=shape, execution=execution)[0]


def megatron_gib(model: ModelSpec, *, sequence_length: int = 4096, **values: Any) -> float:
    """Largest allocation over the stages, as Megatron-core with Transformer Engine and its fused loss has it."""
    plan = plan_of(zero_stage=1, **values)
    execution = replace(FUSED, bytes_per_logit=2)
    training = replace(TRAINING, sequence_length=sequence_length)
    costs = [
        memory(model, plan, state=MEGATRON, stage=stage, execution=execution, training=training)
        for stage in range(len(stages_of(model, plan)))
    ]
    return max(cost.allocated for cost in costs) / GIB


# Four layers of each model. SimuMax (github.com/MooreThreads/SimuMax, docs/b200) prints Megatron's largest allocation.
LLAMA_405B = ModelSpec(
    name="llama3_405b_l4",
    model_type="llama",
    num_layers=4,
    hidden_size=16384,
    num_attention_heads=128,
    num_kv_heads=16,
    ffn_hidden_size=53248,
    vocab_size=128256,
    max_position_embeddings=131072,
)
DEEPSEEK_V3 = ModelSpec(
    name="deepseek_v3_l4",
    model_type="deepseek_v3",
    num_layers=4,
    hidden_size=7168,
    num_attention_heads=128,
    ffn_hidden_size=18432,
    vocab_size=129280,
    max_position_embeddings=4096,
    moe=MoeSpec(
        num_experts=256,
        top_k=8,
        expert_ffn_hidden_size=2048,
        shared_ffn_hidden_size=2048,
        num_dense_layers=1,
    ),
    mla=MlaSpec(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
)
MEASURED: dict[str, tuple[ModelSpec, dict[str, Any], float]] = {
    "dense pp2": (LLAMA_405B, {"dp": 4, "pp": 2}, 87.08),
    "dense tp2": (LLAMA_405B, {"dp": 4, "tp": 2, "sequence_parallel": True}, 81.59),
    "dense tp8": (LLAMA_405B, {"dp": 1, "tp": 8, "sequence_parallel": True}, 38.57),
    "dense cp8": (LLAMA_405B, {"dp": 1, "cp": 8, "sequence_length": 32768}, 139.22),
    "mla moe ep8": (DEEPSEEK_V3, {"dp": 8, "ep": 8}, 104.3),
    "mla moe ep4 pp2": (DEEPSEEK_V3, {"dp": 4, "ep": 4, "pp": 2}, 114.0),
}


@pytest.mark.parametrize("case", MEASURED)
def test_allocations_of_megatron_are_met_within_two_percent(case: str) -> None:
    model, values, gib = MEASURED[case]
    assert megatron_gib(model, **values) == pytest.approx(gib, rel=0.02)


def test_states_match_the_example_of_the_zero_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 ranks are 120, 31.4, 16.6 and 1.9 GB."""
    model = replace(GPT, hidden_size=4096, ffn_hidden_size=16384, num_layers=37, vocab_size=128)
    scale = 7.5e9 / model.num_parameters
    expected = {0: 120, 1: 31.4, 2: 16.6, 3: 1.9}
    for stage, gigabytes in expected.items():
        cost = memory(model, plan_of(dp=64, zero_stage=stage))
        states = cost.weights + cost.gradients + cost.optimizer
        assert states * scale / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_full_recomputation_keeps_layer_inputs_and_one_layer() -> None:
    plan = plan_of(recompute="full")
    layer = layer_bytes(GPT, plan=plan, training=TRAINING, execution=PLAIN, moe=False)
    whole = replace(PLAIN, bytes_per_logit=0)
    head = 2 * layer.input  # the last norm
    found = memory(GPT, plan, execution=whole).activations
    assert found == pytest.approx(8 * layer.input + head + layer.whole - layer.input + layer.working)
    three = memory(GPT, replace(plan, recompute_num_layers=3), execution=whole).activations
    assert three - found == pytest.approx(5 * (layer.whole - layer.input))


def test_the_loss_and_one_layers_backward_pass_share_their_room() -> None:
    """The logits are gone before the first layer is differentiated, so that the larger of the two counts."""
    plan = plan_of(recompute="full")
    small, large = (memory(GPT, plan, execution=replace(PLAIN, bytes_per_logit=w)) for w in (1, 200))
    layer = layer_bytes(GPT, plan=plan, training=TRAINING, execution=PLAIN, moe=False)
    assert small.activations + small.logits == pytest.approx(10 * layer.input + layer.backward)
    assert large.activations == pytest.approx(10 * layer.input)


def test_mixtures_are_recomputed_after_the_dense_layers_before_them() -> None:
    whole = replace(PLAIN, bytes_per_logit=0)
    full = plan_of(recompute="full")
    dense = layer_bytes(MOE, plan=full, training=TRAINING, execution=PLAIN, moe=False)
    mixture = layer_bytes(MOE, plan=full, training=TRAINING, execution=PLAIN, moe=True)
    two, three = (
        memory(MOE, replace(full, recompute_num_layers=count), execution=whole).activations
        for count in (2, 3)
    )
    assert two - three == pytest.approx(mixture.whole - mixture.input)
    none = memory(MOE, plan_of(), execution=whole).activations
    kept = 2 * dense.whole + 6 * mixture.whole + 2 * dense.input
    assert none == pytest.approx(kept + max(dense.working, mixture.working))


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
    # bf16 logits, then fp32 copy, log-probabilities and gradient; fused: one fp32 copy.
    assert memory(GPT, plan, stage=1).logits == pytest.approx(2048 * 5000 * (2 + 12))
    assert memory(GPT, plan, stage=1, execution=FUSED).logits == pytest.approx(2048 * 5000 * (2 + 4))
    assert memory(GPT, replace(plan, precision="fp32"), stage=1).logits == pytest.approx(2048 * 5000 * 12)


def test_logits_are_divided_by_tensor_parallel_ranks_unless_they_are_gathered() -> None:
    split = memory(GPT, plan_of(tp=4)).logits
    gathered = memory(GPT, plan_of(tp=4), execution=replace(PLAIN, gathered_logits=True)).logits
    assert gathered == pytest.approx(4 * split)


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


def test_an_offloaded_optimizer_has_more_on_the_host() -> None:
    plan = plan_of(dp=4, zero_stage=1, offload_optimizer=True)
    shape = stages_of(GPT, plan)[0]
    lean, full = (
        stage_memory(GPT, plan=plan, training=TRAINING, state=replace(STATE, host=host), stage=shape)[1]
        for host in (0.0, 6.0)
    )
    assert full - lean == pytest.approx(6 * shape.all_parameters / 4)


def test_a_disk_keeps_host_memory_free_but_for_what_is_at_hand() -> None:
    capabilities = Capabilities(
        zero_stages=frozenset({3}),
        precisions=frozenset({"bf16"}),
        recompute=frozenset({"none"}),
        state_bytes={"bf16": STATE},
        swapped_elements=1000,
    )
    model = MemoryModel(GPT, TRAINING, capabilities)
    switches: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
    on_host, on_disk = (
        plan_of(dp=4, zero_stage=3, nvme_path=path, **switches) for path in (None, "/local/disk")
    )
    shape = stages_of(GPT, on_host)[0]
    owned = shape.all_parameters / 4
    assert (model.disk_bytes(on_host, shape), model.disk_bytes(on_disk, shape)) == (
        0,
        pytest.approx(owned * (STATE.weights + STATE.gradients + STATE.optimizer)),
    )
    at_hand = 1000 * (STATE.gradients + STATE.optimizer)
    at_hand += min(owned, shape.layer_parameters) * STATE.weights
    assert model.of(on_disk, shape)[1] == pytest.approx(at_hand)
    assert model.of(on_disk, shape)[0] == model.of(on_host, shape)[0]


def test_offloaded_layers_keep_nothing_on_the_device() -> None:
    whole = memory(GPT, plan_of()).activations
    none = memory(GPT, plan_of(), execution=replace(PLAIN, offloaded_layers=8)).activations
    half = memory(GPT, plan_of(), execution=replace(PLAIN, offloaded_layers=4)).activations
    assert half == pytest.approx((whole + none) / 2)


def test_frozen_weights_have_no_gradients_and_no_optimizer() -> None:
    cost = memory(GPT, plan_of(dp=2, zero_stage=2), execution=replace(PLAIN, frozen_weights=True))
    assert (cost.gradients, cost.optimizer) == (0, 0)
    assert cost.weights == memory(GPT, plan_of(dp=2, zero_stage=2)).weights


def test_a_gathered_copy_is_whole_or_a_few_layers() -> None:
    whole = StateBytes(weights=4, gradients=4, optimizer=8, gathered=2, keep_gathered=True)
    shape = stages_of(GPT, plan_of())[0]
    assert memory(GPT, plan_of(), state=whole).buffers == pytest.approx(2 * shape.parameters)
    layered = replace(whole, keep_gathered=False)
    assert memory(GPT, plan_of(), state=layered).buffers < memory(GPT, plan_of(), state=whole).buffers


def test_gradients_are_made_beside_the_buffer_they_are_added_to() -> None:
    """One layer and the head; what the optimizer makes for a step is sharded as its state is."""
    fresh = memory(GPT, plan_of(), state=replace(STATE, fresh_gradients=2)).buffers
    assert fresh == pytest.approx(2 * (GPT.dense_layer_parameters + 5000 * 1024))
    step = replace(STATE, step=4)
    shape = stages_of(GPT, plan_of())[0]
    assert memory(GPT, plan_of(dp=4, zero_stage=1), state=step).buffers == pytest.approx(shape.parameters)
    assert memory(GPT, plan_of(dp=4, zero_stage=1, offload_optimizer=True), state=step).buffers == 0


def test_copies_of_gradients_are_never_sharded() -> None:
    plan = plan_of(dp=8, zero_stage=2)
    shape = stages_of(GPT, plan)[0]
    more = memory(GPT, plan, state=replace(STATE, gradient_copies=4)).gradients
    assert more - memory(GPT, plan).gradients == pytest.approx(4 * shape.parameters)


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
    assert whole.activations <= sharded.activations  # nothing further lives while it is reduced
    assert whole.optimizer == sharded.optimizer


def test_slack_is_part_of_the_total_and_not_of_what_is_allocated() -> None:
    cost = memory(GPT, plan_of())
    assert cost.slack > 0
    assert cost.total == pytest.approx(cost.allocated + cost.slack)


def as_capabilities(**values: Any) -> Capabilities:
    return replace(strategies.load("fake").capabilities, **values)


@pytest.mark.parametrize("model", [GPT, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "capabilities",
    [as_capabilities(), as_capabilities(execution=FUSED), strategies.load("deepspeed").capabilities],
    ids=["all", "fused", "deepspeed"],
)
@pytest.mark.parametrize("split", [{"dp": 8}, {"dp": 2, "tp": 2, "pp": 2}, {"dp": 2, "pp": 4, "vp": 2}])
def test_the_lower_bound_is_never_above_the_total(
    model: ModelSpec, capabilities: Capabilities, split: dict[str, int]
) -> None:
    bound_of, totals = MemoryModel(model, TRAINING, capabilities), []
    for zero, recompute, offload in itertools.product(
        sorted(capabilities.zero_stages), ("none", "selective", "full"), (False, True)
    ):
        plan = plan_of(**split, zero_stage=zero, recompute=recompute, micro_batch_size=2)
        if offload:
            plan = replace(
                plan,
                offload_optimizer=zero in capabilities.offload_optimizer_stages,
                offload_parameters=zero in capabilities.offload_parameters_stages,
            )
        stages = stages_of(model, plan)
        total = max(bound_of.of(plan, stage)[0].total for stage in stages)
        assert bound_of.least_bytes(plan, stages) <= total
        totals.append((offload, total, bound_of.least_bytes(plan, stages, offload=False)))
    resident = [(total, bound) for offload, total, bound in totals if not offload]
    assert all(bound <= total for total, bound in resident)
    # Not a bound that says nothing.
    assert max(bound for _, bound in resident) > 0.1 * min(total for total, _ in resident)
