"""Seconds of arithmetic on one rank: matrix products, attention, element-wise traffic, kernel launches."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.cluster.spec import GpuSpec
from launcher.planner.memory import layer_activation_bytes
from launcher.planner.stages import StageShape
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Precision, TrainingSpec

# Rows at which a matrix product reaches half of its best efficiency; measured products rise about so.
_HALF_EFFICIENCY_ROWS = 128
# Fused attention reaches a lower share of the peak than plain products (FlashAttention-2, figure 5).
_ATTENTION_SHARE = 0.6
# A layer's saved activations are written once and read once more, forward; MEMORY_SHARE of the data sheet's rate.
_TRAFFIC_PER_SAVED_BYTE = 2.0
_MEMORY_SHARE = 0.8
# About 40 kernels a layer, forward, launched one by one from Python.
_LAUNCH_S_PER_LAYER = 150e-6


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """Forward seconds of one micro-batch on one stage; the backward pass takes twice as long."""

    layers: float
    attention: float  # the part of `layers` that selective recomputation repeats
    head: float

    @property
    def forward(self) -> float:
        """All of the stage."""
        return self.layers + self.head


def peak_flops(gpu: GpuSpec, precision: Precision) -> float:
    """FLOP/s that the data sheet promises; a CPU runs every precision at the speed of fp32."""
    return gpu.peak_tflops.get(precision, gpu.peak_tflops.get("fp32", 0.0)) * 1e12


def stage_seconds(
    model: ModelSpec, *, plan: Plan, training: TrainingSpec, gpu: GpuSpec, stage: StageShape
) -> StageSeconds:
    """Return the forward seconds of one micro-batch on one rank of `stage`."""
    tokens = plan.micro_batch_size * training.sequence_length / plan.cp
    rate = peak_flops(gpu, plan.precision) * gpu.matmul_efficiency * tokens / (tokens + _HALF_EFFICIENCY_ROWS)
    scores = model.attention_flops_per_token(training.sequence_length)
    attention = tokens * scores / plan.tp / (rate * _ATTENTION_SHARE)
    layers = stage.num_layers * attention
    for count, moe in ((stage.dense_layers, False), (stage.moe_layers, True)):
        if count:
            flops = 2 * tokens * _active_parameters(model, moe=moe) / plan.tp
            saved = layer_activation_bytes(model, plan=plan, training=training, moe=moe)
            traffic = saved * _TRAFFIC_PER_SAVED_BYTE / (gpu.memory_gb_per_s * 1e9 * _MEMORY_SHARE)
            layers += count * (flops / rate + traffic + _LAUNCH_S_PER_LAYER)
    head = 2 * tokens * model.vocab_size * model.hidden_size / plan.tp / rate if stage.has_head else 0.0
    return StageSeconds(layers=layers, attention=stage.num_layers * attention, head=head)


def optimizer_seconds(gpu: GpuSpec, *, state_bytes: float) -> float:
    """Seconds of Adam over `state_bytes` of weights, gradients and moments: everything read and written once."""
    return 2 * state_bytes / (gpu.memory_gb_per_s * 1e9 * _MEMORY_SHARE)


def _active_parameters(model: ModelSpec, *, moe: bool) -> int:
    if moe and model.moe:
        return model.moe_layer_parameters(model.moe.top_k)
    return model.dense_layer_parameters
