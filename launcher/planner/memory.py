"""Bytes per rank, from first principles: states by ZeRO stage, activations by layer, the loss' workspace.

States: Rajbhandari et al. 2020 (ZeRO), section 3 and figure 1. Activations: Korthikanti et al. 2022, equations
1 to 6, with fused attention (no term in the square of the sequence) and without dropout (no masks), and counted
per matrix, so that gated MLPs, grouped queries and experts are covered.
"""

from __future__ import annotations

from launcher.planner.cost import MemoryCost
from launcher.planner.stages import StageShape, expert_replicas
from strategies.base import StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def stage_memory(
    model: ModelSpec,
    *,
    plan: Plan,
    training: TrainingSpec,
    state: StateBytes,
    stage: StageShape,
    bucket_elements: int = 0,
) -> tuple[MemoryCost, float]:
    """Return bytes on the device and bytes on the host, for one rank of `stage`.

    `bucket_elements` are what the engine's communication buckets hold at ZeRO stages above 0.
    """
    device = {
        "weights": _sharded(stage, plan, state.weights, sharded=plan.zero_stage >= 3),
        "gradients": _sharded(stage, plan, state.gradients, sharded=_shards_gradients(plan, state)),
        "optimizer": _sharded(stage, plan, state.optimizer, sharded=plan.zero_stage >= 1),
    }
    host = dict.fromkeys(device, 0.0)
    # Sharded gradients follow the optimizer, which reads them on the host (ZeRO-Offload, section 4).
    moved = (
        ("weights", plan.offload_parameters),
        ("gradients", plan.offload_optimizer and plan.zero_stage >= 2),
        ("optimizer", plan.offload_optimizer),
    )
    for part, on_host in moved:
        if on_host:
            device[part], host[part] = 0.0, device[part]
    cost = MemoryCost(
        weights=device["weights"],
        gradients=device["gradients"],
        optimizer=device["optimizer"],
        activations=_activations(model, plan, training, stage),
        logits=_logits(model, plan, training) if stage.has_head else 0.0,
        buffers=_buffers(model, plan, training, state, stage) + _buckets(plan, state, stage, bucket_elements),
    )
    return cost, sum(host.values())


def _shards_gradients(plan: Plan, state: StateBytes) -> bool:
    return plan.zero_stage >= 2 and not state.whole_gradients


def _sharded(stage: StageShape, plan: Plan, bytes_per_parameter: float, *, sharded: bool) -> float:
    if not sharded:
        return (stage.parameters + stage.expert_parameters) * bytes_per_parameter
    shared = stage.parameters / (plan.dp * plan.cp)
    return (shared + stage.expert_parameters / expert_replicas(plan)) * bytes_per_parameter


def layer_activation_bytes(model: ModelSpec, *, plan: Plan, training: TrainingSpec, moe: bool) -> float:
    """Bytes that the backward pass of one layer needs, for one micro-batch, nothing recomputed."""
    tokens = plan.micro_batch_size * training.sequence_length / plan.cp
    element = element_bytes(plan)
    # Two norm inputs and the inputs of the first matrices of both blocks (Korthikanti, section 4.1); RMSNorm
    # of Hugging Face also keeps its input in fp32.
    norms = 4.0 * element + (8.0 if model.norm == "rmsnorm" and element < 4 else 0.0)
    replicated = model.hidden_size * norms / (plan.tp if plan.sequence_parallel else 1)
    heads = (2 * model.num_attention_heads + 2 * model.kv_heads) * model.head_size
    if model.mla:
        heads = model.num_attention_heads * 2 * (
            model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim + model.mla.v_head_dim
        ) + 2 * (model.mla.q_lora_rank + model.mla.kv_lora_rank)
    split = (heads + _mlp_elements(model, moe=moe)) * element / plan.tp
    return tokens * (replicated + split)


def _mlp_elements(model: ModelSpec, *, moe: bool) -> float:
    # Gated: gate, up, activated gate, product. Plain: before and after the activation.
    kept = 4 if model.gated_mlp else 2
    if not moe or model.moe is None:
        return kept * model.ffn_hidden_size
    routed = model.moe.top_k * (kept * model.moe.expert_ffn_hidden_size + 2 * model.hidden_size)
    return routed + kept * model.moe.shared_ffn_hidden_size


def element_bytes(plan: Plan) -> int:
    """Bytes of one activation."""
    return 4 if plan.precision == "fp32" else 2


def _activations(model: ModelSpec, plan: Plan, training: TrainingSpec, stage: StageShape) -> float:
    tokens = plan.micro_batch_size * training.sequence_length / plan.cp
    split = plan.tp if plan.sequence_parallel else 1
    layer_input = tokens * model.hidden_size * element_bytes(plan) / split
    dense = layer_activation_bytes(model, plan=plan, training=training, moe=False)
    moe = layer_activation_bytes(model, plan=plan, training=training, moe=True) if stage.moe_layers else 0.0
    in_flight = micro_batches_in_flight(plan, stage.index)
    embedding = layer_input if stage.has_embedding else 0.0
    if plan.recompute == "full":
        # All layers keep their inputs; one layer at a time is whole again.
        largest = max(dense if stage.dense_layers else 0.0, moe)
        return in_flight * (stage.num_layers * layer_input + embedding) + largest
    return in_flight * (stage.dense_layers * dense + stage.moe_layers * moe + embedding)


def micro_batches_in_flight(plan: Plan, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, under 1F1B or its interleaved form.

    Narayanan et al. 2021, sections 2.2.1 and 2.2.2; chunks of an interleaved stage count 1 / vp each.
    """
    if plan.pp == 1:
        return 1.0
    if plan.vp == 1:
        return float(min(plan.num_microbatches, plan.pp - stage))
    chunks = plan.pp * (plan.vp - 1) + 2 * (plan.pp - stage) - 1
    return min(chunks, plan.num_microbatches * plan.vp) / plan.vp


def _logits(model: ModelSpec, plan: Plan, training: TrainingSpec) -> float:
    """Logits, their fp32 copy where they are narrower, the log-probabilities and the gradient in fp32."""
    tokens = plan.micro_batch_size * training.sequence_length / plan.cp
    element = element_bytes(plan)
    copies = element + 8 + (4 if element < 4 else 0)
    return tokens * model.vocab_size * copies / plan.tp


def _buckets(plan: Plan, state: StateBytes, stage: StageShape, elements: int) -> float:
    if plan.zero_stage == 0:
        return 0.0
    return min(elements, stage.parameters + stage.expert_parameters) * state.gradients


def _buffers(
    model: ModelSpec, plan: Plan, training: TrainingSpec, state: StateBytes, stage: StageShape
) -> float:
    everything = stage.parameters + stage.expert_parameters
    # The layer in use and the next one, and the root unit; never more than there is.
    unit = min(everything, 2 * stage.layer_parameters + stage.root_parameters)
    missing = everything - _sharded(stage, plan, 1.0, sharded=True)
    gathered = everything if state.keep_gathered else unit
    buffers = gathered * state.gathered
    if plan.zero_stage >= 3 and not state.gathered:
        buffers += min(unit, everything if plan.offload_parameters else missing) * state.weights
    if _shards_gradients(plan, state):
        buffers += min(unit, missing) * state.gradients
    if plan.pp > 1:
        tokens = plan.micro_batch_size * training.sequence_length / plan.cp
        buffers += 2 * tokens * model.hidden_size * element_bytes(plan)
    return buffers
