"""Arithmetic per stage: agrees with the model's FLOPs, falls with the degrees, never exceeds the peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.spec import GpuSpec
from launcher.planner.compute import optimizer_seconds, peak_flops, stage_seconds
from launcher.planner.stages import stages_of
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=8,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
)
TRAINING = TrainingSpec(sequence_length=4096, global_batch_size=64, num_steps=10)
GPU = GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0, "fp32": 20.0})


def plan_of(**values: Any) -> Plan:
    defaults: dict[str, Any] = {"strategy": "s", "dp": 1}
    return Plan(**(defaults | values))


def forward(model: ModelSpec, plan: Plan, *, gpu: GpuSpec = GPU, stage: int = 0) -> float:
    shape = stages_of(model, plan)[stage]
    return stage_seconds(model, plan=plan, training=TRAINING, gpu=gpu, stage=shape).forward


def test_a_perfect_device_takes_the_time_of_the_models_flops() -> None:
    perfect = replace(GPU, matmul_efficiency=1.0, memory_gb_per_s=1e9)
    plan = plan_of(micro_batch_size=64)
    flops = MODEL.flops_per_token(TRAINING.sequence_length) / 3 * TRAINING.sequence_length * 64
    ideal = flops / peak_flops(perfect, "bf16")
    # Attention runs at a share of the products' rate, and launches are counted: slower, but not by much.
    assert ideal < forward(MODEL, plan, gpu=perfect) < 1.2 * ideal


def test_degrees_divide_the_work() -> None:
    whole = forward(MODEL, plan_of())
    assert whole / 2 < forward(MODEL, plan_of(tp=2)) < 0.6 * whole
    assert whole / 2 < forward(MODEL, plan_of(cp=2)) < 0.6 * whole
    assert forward(MODEL, plan_of(pp=2)) < forward(MODEL, plan_of(pp=2), stage=1) < whole


def test_larger_micro_batches_are_more_efficient() -> None:
    assert forward(MODEL, plan_of(micro_batch_size=4)) < 4 * forward(MODEL, plan_of(micro_batch_size=1))


def test_only_active_experts_cost_time() -> None:
    moe = MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=4096)
    few = forward(replace(MODEL, moe=moe), plan_of())
    assert forward(replace(MODEL, moe=replace(moe, num_experts=64)), plan_of()) < 1.02 * few
    assert forward(replace(MODEL, moe=replace(moe, top_k=4)), plan_of()) > 1.2 * few


def test_a_cpu_runs_every_precision_at_the_speed_of_fp32() -> None:
    cpu = replace(GPU, device="cpu", peak_tflops={"fp32": 0.1})
    assert peak_flops(cpu, "bf16") == peak_flops(cpu, "fp32") == 1e11
    assert peak_flops(GPU, "bf16") == 3e14


def test_the_optimizer_moves_its_states_in_and_out() -> None:
    assert optimizer_seconds(GPU, state_bytes=2e12) == pytest.approx(2.5)  # 2 * 2 TB at 80 % of 2 TB/s
