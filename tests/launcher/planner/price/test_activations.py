"""Bytes that one layer keeps, against the published formulas and counted tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.planner.price.activations import LayerBytes, layer_bytes
from strategies.base import Execution
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
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
LLAMA = replace(GPT, model_type="llama", gated_mlp=True, norm="rmsnorm", num_kv_heads=4)
MOE = replace(LLAMA, moe=MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=512))
MLA = replace(
    LLAMA,
    mla=MlaSpec(q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
)
TRAINING = TrainingSpec(sequence_length=2048, global_batch_size=64, num_steps=10)
MEGATRON = Execution(fused_kernels=True, attention="fused_softmax", dropout=True)
FUSED = Execution(fused_kernels=True)
HIDDEN = TRAINING.sequence_length * GPT.hidden_size  # s h, one sequence
# Sums of flash attention, 4 bytes a head and token.
SUMS = 4 * TRAINING.sequence_length * GPT.num_attention_heads


def one(model: ModelSpec, *, execution: Execution = FUSED, moe: bool = False, **values: Any) -> LayerBytes:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1}
    plan = Plan(**(defaults | values))
    return layer_bytes(model, plan=plan, training=TRAINING, execution=execution, moe=moe)


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (4, False), (4, True)])
def test_a_plain_layer_follows_korthikanti(tp: int, sequence_parallel: bool) -> None:
    """Equations 1, 2 and 4: s b h (34 + 5 a s / h), of which 10 s b h is repeated without sequence parallelism."""
    scores = 5 * GPT.num_attention_heads * TRAINING.sequence_length / GPT.hidden_size
    factor = (34 + scores) / tp if sequence_parallel else 10 + (24 + scores) / tp
    found = one(GPT, execution=MEGATRON, tp=tp, sequence_parallel=sequence_parallel, micro_batch_size=3).whole
    assert found == pytest.approx(3 * (HIDDEN * factor + SUMS / tp))


def test_selective_recomputation_drops_the_scores() -> None:
    """Korthikanti, equation 6: 34 s b h / t remain."""
    layer = one(GPT, execution=MEGATRON, recompute="selective")
    assert layer.kept == pytest.approx(34 * HIDDEN + SUMS)
    assert layer.backward == pytest.approx(layer.whole - layer.kept + layer.working)
    assert one(GPT, recompute="selective").kept == one(GPT).kept  # flash attention stores no scores


def test_full_recomputation_keeps_the_input() -> None:
    """Korthikanti, section 5: 2 s b h."""
    layer = one(GPT, recompute="full")
    assert layer.kept == layer.least == layer.input == pytest.approx(2 * HIDDEN)
    split = replace(FUSED, checkpoints="split")
    assert one(GPT, execution=split, recompute="full", tp=4).kept == pytest.approx(2 * HIDDEN / 4)
    assert one(GPT, execution=replace(split, checkpoints="host"), recompute="full").kept == 0


def test_a_gated_layer_with_grouped_queries_is_counted_tensor_by_tensor() -> None:
    """Fused: two norms' inputs and results, queries and result, keys and values of a quarter, gate, up and product."""
    elements = 4 + 2 + 2 / 4 + 3 * 4
    assert one(LLAMA).whole == pytest.approx(2 * HIDDEN * elements + SUMS)
    # Eager: norms in fp32 and once more before their weights, keys and values repeated, the gate activated apart.
    eager = 8 + 4 + 4 * 4
    assert one(LLAMA, execution=Execution()).whole == pytest.approx(2 * HIDDEN * eager + SUMS)
    partly = replace(FUSED, eager_activation=True)
    assert one(LLAMA, execution=partly).whole == pytest.approx(2 * HIDDEN * (elements + 4) + SUMS)


@pytest.mark.parametrize(
    ("modules", "dropped"), [(("mlp",), 3 * 4), (("layernorm",), 2), (("layernorm", "mlp"), 14), ((), 0)]
)
def test_named_parts_are_dropped(modules: tuple[str, ...], dropped: int) -> None:
    layer = one(LLAMA, recompute="selective", recompute_modules=modules)
    assert layer.whole - layer.kept == pytest.approx(2 * HIDDEN * dropped)


def test_the_operator_policy_keeps_every_second_product() -> None:
    """Input, attention's result, queries, values, gate and down projection: 1 + 1 + 1 + 1/4 + 4 + 1 hidden sizes."""
    policy = replace(FUSED, selective_operators=True)
    layer = one(LLAMA, execution=policy, recompute="selective")
    assert layer.kept == pytest.approx(2 * HIDDEN * 8.25)


def test_quantized_inputs_take_one_byte_and_a_copy_of_attentions_result() -> None:
    """In 8 bits: two norms' results and the product of gate and up; attention keeps its own result in 16."""
    narrow = replace(FUSED, quantized_inputs=True)
    assert one(LLAMA, execution=narrow).whole == one(LLAMA).whole  # bf16
    saved = HIDDEN * (2 + 4 - 1)
    found = one(LLAMA, execution=narrow, precision="fp8").whole
    assert found == pytest.approx(one(LLAMA).whole - saved)
    assert one(LLAMA, precision="fp8").whole == one(LLAMA).whole


def test_latents_stay_when_what_is_made_from_them_is_recomputed() -> None:
    """DeepSeek-V2, section 2.1: queries and keys of 96, keys without rotation and values of 128 a head."""
    layer = one(MLA, recompute="selective", recompute_modules=("mla_up_proj",))
    made = 16 * (2 * 96 + 128)
    assert layer.whole - layer.kept == pytest.approx(2 * TRAINING.sequence_length * made)
    norms, latents, result = 4 * 1024, 2 * (256 + 128) + 32, 16 * 64
    mlp = 3 * 4096
    expected = 2 * TRAINING.sequence_length * (norms + latents + result + made + mlp) + SUMS
    assert layer.whole == pytest.approx(expected)


def test_experts_keep_their_tokens_by_top_k() -> None:
    dense = one(replace(MOE, ffn_hidden_size=512)).whole
    mixture = one(MOE, moe=True)
    tokens = TRAINING.sequence_length
    # Every token twice: its copy for the expert, gate, up and product, index and weight; and the router in fp32.
    routed = 2 * (2 * 1024 + 2 * 3 * 512 + 16) + 12 * 8
    assert mixture.whole == pytest.approx(dense - tokens * 2 * 3 * 512 + tokens * routed)
    without = one(MOE, moe=True, recompute="selective", recompute_modules=("moe_act",))
    assert mixture.whole - without.kept == pytest.approx(tokens * 2 * 2 * 512)
    split = one(MOE, moe=True, tp=4, ep=2, dp=2, sequence_parallel=True)
    assert split.whole == pytest.approx(mixture.whole / 4)


def test_context_parallel_ranks_share_the_tokens() -> None:
    assert one(LLAMA, cp=4).whole == pytest.approx(one(LLAMA).whole / 4)
    assert one(LLAMA, cp=4).working == pytest.approx(one(LLAMA).working / 4)


def test_stored_scores_grow_with_the_square_of_the_sequence() -> None:
    double = replace(TRAINING, sequence_length=2 * TRAINING.sequence_length)
    unfused = Execution(attention="unfused")
    plan = Plan(strategy="s", dp=1)

    def scores(training: TrainingSpec) -> float:
        stored = layer_bytes(GPT, plan=plan, training=training, execution=unfused, moe=False)
        flash = layer_bytes(GPT, plan=plan, training=training, execution=Execution(), moe=False)
        return stored.whole - flash.whole

    assert scores(double) == pytest.approx(4 * scores(TRAINING))
    # fp32 results of the softmax and their copy in 16 bits
    assert scores(TRAINING) == pytest.approx(6 * 16 * TRAINING.sequence_length**2)
