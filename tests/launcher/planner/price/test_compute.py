"""Arithmetic of one rank: FLOPs over peak on a perfect device, and each thing that a real one adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.efficiency import Efficiency
from launcher.cluster.spec import GpuSpec
from launcher.planner.price.compute import Compute, LayerSeconds, peak_flops, stage_seconds
from launcher.planner.price.stages import stages_of
from strategies.base import Execution
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

# One layer's matrices hold 4 * 2^20 + 3 * 2^22 = 2^24 elements; a sequence has 2^12 tokens.
MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=4,
    hidden_size=1024,
    num_attention_heads=8,
    ffn_hidden_size=4096,
    vocab_size=32768,
    max_position_embeddings=4096,
)
TRAINING = TrainingSpec(sequence_length=4096, global_batch_size=64, num_steps=10)
PERFECT = Efficiency(
    matmul={"bf16": 1.0},
    matmul_half_size=0.0,
    matmul_us=0.0,
    misaligned_matmul=1.0,
    grouped_matmul=1.0,
    grouped_narrow=1.0,
    attention={"flash3": 1.0, "flash": 1.0, "flash1": 1.0, "unfused": 1.0},
    attention_backward=1.0,
    attention_half_tiles=0.0,
    ring_attention=1.0,
    memory=1.0,
    kernel_us=0.0,
    moe_stall_ms=0.0,
)
PEAK = 2.0**40  # FLOP/s
# Endless bandwidth: all that remains is arithmetic.
ARITHMETIC = GpuSpec(
    name="G",
    memory_gib=80.0,
    memory_gb_per_s=1e30,
    peak_tflops={"bf16": PEAK / 1e12, "fp8": 2 * PEAK / 1e12},
    efficiency=PERFECT,
)
BANDWIDTH = 2.0**30  # bytes/s
# Endless arithmetic: all that remains is traffic.
TRAFFIC = replace(ARITHMETIC, memory_gb_per_s=BANDWIDTH / 1e9, peak_tflops={"bf16": 1e30, "fp8": 1e30})
REAL = replace(ARITHMETIC, memory_gb_per_s=2000.0, efficiency=Efficiency())
FUSED = Execution(fused_kernels=True)

# 2 * 2^24 * 2^12 FLOPs; 2 * 2^11 * 8 * 256 * 2^12 under the causal mask, and 64 tokens of every 4,096 lost to its edge.
PRODUCTS_S = 2.0**-3
ATTENTION_S = 2.0**-5 * (1 + 1 / 64)


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1}
    return Plan(**(defaults | values))


def layer(
    model: ModelSpec = MODEL,
    gpu: GpuSpec = ARITHMETIC,
    execution: Execution = FUSED,
    *,
    moe: bool = False,
    **plan: Any,
) -> LayerSeconds:
    return Compute(model, TRAINING, gpu, execution).layer(plan_of(**plan), moe=moe)


def head(
    model: ModelSpec = MODEL, gpu: GpuSpec = ARITHMETIC, execution: Execution = FUSED, **plan: Any
) -> tuple[float, float]:
    return Compute(model, TRAINING, gpu, execution).head(plan_of(**plan))


def with_efficiency(gpu: GpuSpec, **figures: Any) -> GpuSpec:
    return replace(gpu, efficiency=replace(gpu.efficiency, **figures))


def test_a_perfect_device_takes_flops_over_peak() -> None:
    found = layer()
    assert found.forward == pytest.approx(PRODUCTS_S + ATTENTION_S, rel=1e-12)
    # Twice the products, and five products of attention where the forward pass has two.
    assert found.backward == pytest.approx(2 * PRODUCTS_S + 2.5 * ATTENTION_S, rel=1e-12)
    assert head() == pytest.approx((0.25, 0.5), rel=1e-12)  # 2 * 2^12 * 2^10 * 2^15 FLOPs


def test_a_whole_model_takes_its_own_count_of_flops() -> None:
    plan = plan_of()
    compute = Compute(MODEL, TRAINING, ARITHMETIC, FUSED)
    (stage,) = stages_of(MODEL, plan)
    forward, backward = stage_seconds(compute, plan, stage)
    model_s = MODEL.flops_per_token(4096) * 4096 / PEAK
    # More than the count: attention's edge, and half a product of it more in the backward pass. Less: norms, whose
    # weights the count takes for matrices.
    extra = 4 * (ATTENTION_S - 2.0**-5) + 4 * (2.5 * ATTENTION_S - 2 * 2.0**-5)
    assert forward + backward == pytest.approx(model_s + extra, rel=1e-4)


def test_micro_batches_scale_and_gain_on_a_real_device() -> None:
    assert layer(micro_batch_size=2).forward == pytest.approx(2 * layer().forward)
    one, two = layer(gpu=REAL), layer(gpu=REAL, micro_batch_size=2)
    assert 1.5 * one.forward < two.forward < 2 * one.forward
    assert 1.5 * one.backward < two.backward < 2 * one.backward


@pytest.mark.parametrize("degree", ["tp", "cp"])
def test_degrees_split_the_work_and_lose_on_a_real_device(degree: str) -> None:
    degrees: dict[str, Any] = {degree: 4}
    assert layer(**degrees).forward == pytest.approx(layer().forward / 4)
    assert layer(**degrees).backward == pytest.approx(layer().backward / 4)
    assert layer(gpu=REAL, **degrees).forward > layer(gpu=REAL).forward / 4
    assert (head(tp=4)[0], head(cp=2)[0]) == pytest.approx((0.25 / 4, 0.25 / 2))


def test_ring_attention_loses_a_share_with_each_doubling() -> None:
    ring = with_efficiency(ARITHMETIC, ring_attention=0.5)
    assert layer(gpu=ring, cp=4).parts["core_attn"] == pytest.approx(ATTENTION_S / 4 / 0.5**2)


def test_key_heads_are_copied_where_ranks_outnumber_them() -> None:
    grouped = replace(MODEL, num_kv_heads=2)
    # Of 2^20 elements for keys and 2^20 for values a quarter is left; in FLOPs, 2 * 2^12 tokens.
    saved = 2 * 2**12 * (2 - 2 / 4) * 2**20 / PEAK
    assert layer().forward - layer(grouped).forward == pytest.approx(saved)
    assert layer(grouped, tp=2).forward == pytest.approx(layer(grouped).forward / 2)
    copied = 2 * 2**12 * 2 * 128 * 1024 / PEAK / 2  # one head a rank, where half a one would do
    assert layer(grouped, tp=4).forward == pytest.approx(layer(grouped).forward / 4 + copied)


def test_frozen_weights_need_no_product_of_their_own() -> None:
    frozen = layer(execution=replace(FUSED, frozen_weights=True))
    assert frozen.forward == layer().forward
    assert frozen.backward == pytest.approx(PRODUCTS_S + 2.5 * ATTENTION_S)


MOE = replace(
    MODEL, moe=MoeSpec(num_experts=16, top_k=4, expert_ffn_hidden_size=512, shared_ffn_hidden_size=1024)
)
ROUTED_S = 4 * 3 * 2 * 2**12 * 2**10 * 2**9 / PEAK
SHARED_S = 3 * 2 * 2**12 * 2**10 * 2**10 / PEAK
ROUTER_S = 2 * 2**12 * 2**10 * 16 / PEAK
PROJECTIONS_S = 4 * 2 * 2**12 * 2**20 / PEAK


def test_a_token_passes_its_own_experts_only() -> None:
    expected = PROJECTIONS_S + ATTENTION_S + ROUTED_S + SHARED_S + ROUTER_S
    assert layer(MOE, moe=True).forward == pytest.approx(expected)
    # A balanced router: a rank's experts see as many tokens as its tokens have choices, however many ranks there are.
    assert layer(MOE, moe=True, dp=8, ep=8).forward == pytest.approx(expected)
    assert layer(MOE).forward == layer().forward


@pytest.mark.parametrize("etp", [1, 4])
def test_experts_share_the_work_of_tensor_parallel_ranks_either_way(etp: int) -> None:
    whole = layer(MOE, moe=True).forward
    assert layer(MOE, moe=True, dp=4, tp=4, ep=4, etp=etp).forward == pytest.approx(whole / 4)


def test_few_rows_for_an_expert_cost_more_on_a_real_device() -> None:
    many = replace(MOE, moe=MoeSpec(num_experts=256, top_k=4, expert_ffn_hidden_size=512))
    some = replace(MOE, moe=MoeSpec(num_experts=16, top_k=4, expert_ffn_hidden_size=512))
    assert layer(many, gpu=REAL, moe=True).forward > 1.2 * layer(some, gpu=REAL, moe=True).forward


def test_grouped_products_wait_for_the_busiest_rank() -> None:
    balanced = layer(MOE, moe=True).forward
    learned = layer(MOE, moe=True, execution=replace(FUSED, expert_imbalance=1.5)).forward
    assert learned - balanced == pytest.approx(ROUTED_S / 2)
    slow = with_efficiency(ARITHMETIC, grouped_matmul=0.5, grouped_narrow=0.25)
    assert layer(MOE, gpu=slow, moe=True).forward - balanced == pytest.approx(ROUTED_S)
    narrow, perfect = (layer(MOE, gpu=gpu, moe=True, precision="fp8").forward for gpu in (slow, ARITHMETIC))
    assert narrow - perfect == pytest.approx(3 * ROUTED_S / 2)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1.0),
        ({"deduplicated_dispatch": True}, 0.3),
        ({"cuda_graphs": "partial"}, 0.6),
        ({"cuda_graphs": "full"}, 0.0),
    ],
)
def test_routing_stalls_the_host_where_no_graph_holds_it(changes: dict[str, Any], share: float) -> None:
    stalled = with_efficiency(ARITHMETIC, moe_stall_ms=10.0)
    before, after = (
        layer(MOE, gpu=gpu, execution=replace(FUSED, **changes), moe=True) for gpu in (ARITHMETIC, stalled)
    )
    assert after.forward - before.forward == pytest.approx(share * 0.004)
    assert after.backward - before.backward == pytest.approx(share * 0.006)


@pytest.mark.parametrize("q_lora_rank", [0, 256])
def test_latent_attention_goes_down_and_up(q_lora_rank: int) -> None:
    mla = MlaSpec(
        q_lora_rank=q_lora_rank, kv_lora_rank=128, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=64
    )
    down = 1024 * (q_lora_rank + 128 + 32)
    up = (q_lora_rank or 1024) * 8 * 128 + 128 * 8 * (96 + 64)
    out = 8 * 64 * 1024
    per_parameter = 2 * 2**12 / PEAK
    found = layer(replace(MODEL, mla=mla))
    attention = 2**12 * 2 * 2**11 * 8 * (128 + 64) / PEAK * (1 + 1 / 64)
    mlp = 3 * 2**22
    assert found.parts["mla_up_proj"] == pytest.approx(up * per_parameter)
    assert found.parts["core_attn"] == pytest.approx(attention)
    assert found.forward == pytest.approx((down + up + out + mlp) * per_parameter + attention)
    assert layer().parts["mla_up_proj"] == 0


@pytest.mark.parametrize(("kernel", "passes"), [("fused_softmax", 4), ("unfused", 10)])
def test_stored_scores_are_a_full_square_written_and_read(kernel: Any, passes: int) -> None:
    execution = replace(FUSED, attention=kernel)
    assert layer(execution=execution).parts["core_attn"] == pytest.approx(2 * ATTENTION_S)
    traffic_s = passes * 2 * 8 * 2**24 / BANDWIDTH  # 8 heads of 4,096 x 4,096 scores of two bytes
    stored, flash = layer(gpu=TRAFFIC, execution=execution), layer(gpu=TRAFFIC)
    assert stored.forward - flash.forward == pytest.approx(traffic_s)
    assert stored.backward - flash.backward == pytest.approx(1.5 * traffic_s)


@pytest.mark.parametrize("kernel", ["flash3", "flash", "flash1"])
def test_each_kernel_reaches_its_own_share(kernel: Any) -> None:
    shares = {"flash3": 0.8, "flash": 0.5, "flash1": 0.25, "unfused": 0.1}
    found = layer(
        gpu=with_efficiency(ARITHMETIC, attention=shares), execution=replace(FUSED, attention=kernel)
    )
    assert found.parts["core_attn"] == pytest.approx(ATTENTION_S / shares[kernel])


def test_attention_suffers_from_few_tiles_and_narrow_heads() -> None:
    # 4,096 tokens make 32 tiles for each of 8 heads.
    tiles = with_efficiency(ARITHMETIC, attention_half_tiles=256.0)
    assert layer(gpu=tiles).parts["core_attn"] == pytest.approx(2 * ATTENTION_S)
    assert layer(gpu=tiles, tp=8).parts["core_attn"] == pytest.approx(ATTENTION_S / 8 * 9)
    narrow = replace(MODEL, num_attention_heads=16)  # 64 elements each
    assert layer(narrow).parts["core_attn"] == pytest.approx(ATTENTION_S * 1.5 / 1.25)
    window = replace(MODEL, sliding_window=512)
    assert layer(window).parts["core_attn"] == pytest.approx(ATTENTION_S / 4)


def test_short_sides_run_below_the_peak() -> None:
    half = with_efficiency(ARITHMETIC, matmul_half_size=1024.0)
    assert head(gpu=half)[0] == pytest.approx(0.25 * (1 + 1 / 4 + 1 / 32 + 1))
    assert head(gpu=with_efficiency(ARITHMETIC, matmul_us=1e6))[0] == pytest.approx(1.25)


def test_sides_that_tensor_cores_do_not_like() -> None:
    gpu = with_efficiency(ARITHMETIC, misaligned_matmul=0.5)
    assert head(gpu=gpu)[0] == pytest.approx(0.25)
    odd = replace(MODEL, vocab_size=32767)
    assert head(odd, gpu)[0] == pytest.approx(2 * head(odd)[0])


def test_narrow_products_are_faster_and_pay_for_quantising() -> None:
    assert layer(precision="fp8").forward == pytest.approx(PRODUCTS_S / 2 + ATTENTION_S)
    assert head(precision="fp8") == head()  # which stays in 16 bits
    narrow, wide = layer(gpu=TRAFFIC, precision="fp8"), layer(gpu=TRAFFIC)
    # Two bytes read, one written as it is and one transposed: the inputs of four products, then their results.
    inputs, results = 3 * 1024 + 4096, 3 * 1024 + 1024 + 2 * 4096 + 1024
    assert narrow.forward - wide.forward == pytest.approx(4 * 2**12 * inputs / BANDWIDTH)
    assert narrow.backward - wide.backward == pytest.approx(4 * 2**12 * results / BANDWIDTH)


def test_products_wait_for_memory_where_they_are_small() -> None:
    one_token = replace(TRAINING, sequence_length=1)
    plan = plan_of()
    forward, backward = Compute(MODEL, one_token, TRAFFIC, FUSED).head(plan)
    weights, logits, inputs = 2 * 2**25, 2 * 2**15, 2 * 2**10
    assert forward == pytest.approx((weights + logits + inputs + 3 * 4 * 2**15) / BANDWIDTH)
    # Twice, and the gradients' buffer of four bytes read and written.
    product = (weights + logits + inputs) / BANDWIDTH
    assert backward - 3 * 4 * 2**15 / BANDWIDTH == pytest.approx(2 * product + 8 * 2**25 / BANDWIDTH)


def test_fewer_kernels_move_less() -> None:
    eager = layer(gpu=TRAFFIC, execution=Execution())
    assert eager.forward > 1.3 * layer(gpu=TRAFFIC).forward
    norms = replace(MODEL, norm="layernorm", learned_positions=True)
    # Two norms and two sums of 16 bits: read and written, and three more; no rotation.
    layernorm_s = 2 * 5 * 1024 * 2 * 2**12 / BANDWIDTH
    assert layer(norms, TRAFFIC).parts["layernorm"] == pytest.approx(layernorm_s / 2)
    plain = layer(gpu=TRAFFIC, tp=4).parts["layernorm"]
    assert layer(gpu=TRAFFIC, tp=4, sequence_parallel=True).parts["layernorm"] < plain
    # SwiGLU reads two and writes one, of 4,096 elements each.
    assert layer(gpu=TRAFFIC).parts["moe_act"] == pytest.approx(3 * 4096 * 2 * 2**12 / BANDWIDTH)


TINY = replace(MODEL, hidden_size=64, num_attention_heads=1, ffn_hidden_size=64)


@pytest.mark.parametrize(
    ("execution", "kernels"),
    [
        (Execution(), 36.0),
        (FUSED, 14.0),
        (replace(FUSED, cuda_graphs="partial"), 0.6 * 14),
        (replace(FUSED, cuda_graphs="full"), 0.0),
    ],
)
def test_tiny_layers_wait_for_the_host_that_launches_them(execution: Execution, kernels: float) -> None:
    launching = with_efficiency(ARITHMETIC, kernel_us=1e5)
    device, found = layer(TINY, ARITHMETIC, execution), layer(TINY, launching, execution)
    assert found.forward == pytest.approx(max(device.forward, kernels * 0.1))
    assert found.backward == pytest.approx(max(device.backward, 1.5 * kernels * 0.1))
    large = layer(gpu=with_efficiency(ARITHMETIC, kernel_us=1.0), execution=execution)
    assert large == layer(execution=execution)  # launched ahead


def test_experts_are_more_kernels() -> None:
    launching = with_efficiency(ARITHMETIC, kernel_us=1e6)
    assert layer(MOE, launching, moe=True).forward == pytest.approx(14 + 20)
    assert layer(MOE, launching, Execution(), moe=True).forward == pytest.approx(36 + 60)


def test_a_cpu_launches_for_itself() -> None:
    cpu = replace(with_efficiency(ARITHMETIC, kernel_us=100.0), device="cpu")
    assert layer(gpu=cpu).forward == pytest.approx(layer().forward + 14e-4)


def test_a_cpu_runs_every_precision_at_the_speed_of_fp32() -> None:
    cpu = replace(ARITHMETIC, device="cpu", peak_tflops={"fp32": 0.1})
    assert peak_flops(cpu, "bf16") == peak_flops(cpu, "fp32") == 1e11
    assert peak_flops(ARITHMETIC, "fp8") == 2 * PEAK


def test_what_selective_recomputation_may_repeat() -> None:
    dense, experts = layer().parts, layer(MOE, moe=True).parts
    assert dense["core_attn"] == pytest.approx(ATTENTION_S)
    assert (dense["mlp"], dense["moe"]) == pytest.approx((PRODUCTS_S * 3 / 4, 0))
    assert (experts["mlp"], experts["moe"]) == pytest.approx((0, ROUTED_S + SHARED_S + ROUTER_S))


def test_embedding_and_optimizer_move_bytes() -> None:
    compute = Compute(MODEL, TRAINING, TRAFFIC, FUSED)
    rows = 2**12 * 2**10 * 2 / BANDWIDTH
    assert compute.embedding(plan_of()) == pytest.approx((2 * rows, 4 * rows))
    assert compute.optimizer(state_bytes=BANDWIDTH) == pytest.approx(2.2)


def test_plans_that_share_a_layer_time_it_once() -> None:
    compute = Compute(MODEL, TRAINING, REAL, FUSED)
    one = compute.layer(plan_of(), moe=False)
    assert compute.layer(plan_of(dp=8, pp=2, zero_stage=3, recompute="full"), moe=False) is one
    assert compute.layer(plan_of(micro_batch_size=2), moe=False) is not one
