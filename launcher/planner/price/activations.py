"""Bytes that layers keep for the backward pass, by kind of layer (dense, mixture of experts, MLA) and recomputation.

Korthikanti et al. 2022 (arXiv 2205.05198), section 4: what autograd saves, tensor by tensor, so that gated MLPs,
grouped queries, latent attention, experts and unfused kernels are counted beside their plain GPT. Numbers are elements
or bytes of one token on one rank until `LayerBytes`, which is one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.base import Execution
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

# Bytes of one stored score: fused softmax keeps its result (Korthikanti, section 4.1, without dropout), eager attention
# keeps it in fp32 and once more in the width of the products. While its gradient is computed: copies of it.
_SCORES = {"fused_softmax": (0, 1), "unfused": (4, 1)}
_SCORE_GRADIENTS = {"fused_softmax": (0, 2), "unfused": (8, 2)}
# A chosen expert's token is known by index and weight, and the router's logits and probabilities stay in fp32.
_ROUTED_TOKEN_BYTES = 16
_ROUTER_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One layer, one micro-batch, one rank."""

    whole: float  # kept where nothing is recomputed
    kept: float  # kept where the plan's parts are recomputed; with full recomputation the input alone
    least: float  # kept under full recomputation, whatever the plan says
    input: float  # what the layer before hands over
    working: float  # lives beside all that while the layer's backward pass runs: gradients on their way

    @property
    def backward(self) -> float:
        """Bytes beside `kept` while this layer's backward pass runs: what it recomputed, and gradients."""
        return self.whole - self.kept + self.working


def layer_bytes(
    model: ModelSpec, *, plan: Plan, training: TrainingSpec, execution: Execution, moe: bool
) -> LayerBytes:
    """Return what one layer of a kind costs."""
    tokens = tokens_of(plan, training)
    parts = _parts(model, plan, training, execution, moe=moe)
    whole = sum(parts.values())
    layer_input = element_bytes(plan) * model.hidden_size / _split(plan)
    least = min(whole, _checkpoint(model, plan, execution))
    kept = whole
    if plan.recompute == "full":
        kept = least
    elif plan.recompute == "selective":
        kept = (
            _operators_kept(model, plan, moe=moe)
            if execution.selective_operators
            else whole - sum(parts.get(name, 0.0) for name in plan.recompute_modules or ("core_attn",))
        )
    return LayerBytes(
        whole=tokens * whole,
        kept=tokens * max(least, min(kept, whole)),
        least=tokens * least,
        input=tokens * layer_input,
        working=tokens * _working(model, plan, training, execution, moe=moe),
    )


def _checkpoint(model: ModelSpec, plan: Plan, execution: Execution) -> float:
    """Return the bytes of what full recomputation starts from."""
    if execution.checkpoints == "host":
        return 0.0
    split = plan.tp if execution.checkpoints == "split" else _split(plan)
    return element_bytes(plan) * model.hidden_size / split


def tokens_of(plan: Plan, training: TrainingSpec) -> float:
    """Tokens of one micro-batch on one context parallel rank."""
    return plan.micro_batch_size * training.sequence_length / plan.cp


def element_bytes(plan: Plan) -> int:
    """Bytes of one activation."""
    return 4 if plan.precision == "fp32" else 2


def _split(plan: Plan) -> int:
    """Ranks that share what tensor parallelism alone would repeat (Korthikanti, section 4.2.2)."""
    return plan.tp if plan.sequence_parallel else 1


def _input_bytes(plan: Plan, execution: Execution) -> float:
    """Bytes of a kept input of a matrix product."""
    return 1.0 if execution.quantized_inputs and plan.precision in ("fp8", "nvfp4") else element_bytes(plan)


def _parts(
    model: ModelSpec, plan: Plan, training: TrainingSpec, execution: Execution, *, moe: bool
) -> dict[str, float]:
    """Return bytes of one token by part, in the words of plan.recompute_modules where one can be recomputed."""
    element, product, hidden = element_bytes(plan), _input_bytes(plan, execution), model.hidden_size
    parts = {
        "inputs": 2 * element * hidden / _split(plan),
        "layernorm": 2 * product * hidden / _split(plan),
        "core_attn": _score_bytes(model, plan, training, execution),
    }
    if model.norm == "rmsnorm" and not execution.fused_kernels and element < 4:
        # Hugging Face's keeps its input in fp32, and the normalized one before its weights are applied.
        parts["inputs"] = 2 * (4 + element) * hidden / _split(plan)
    if execution.dropout:
        parts["masks"] = 2.0 * hidden / _split(plan)
    if model.mla:
        parts["mla"], parts["mla_up_proj"] = _latent(model, model.mla, plan, product)
    else:
        parts["attention"] = _attention(model, plan, execution, product)
    if moe and model.moe:
        parts |= _expert_parts(model, model.moe, plan, execution)
    else:
        up, down = _mlp(model, execution)
        parts["mlp"] = (element * up + product * down) * model.ffn_hidden_size / plan.tp
    return parts


def _attention(model: ModelSpec, plan: Plan, execution: Execution, product: float) -> float:
    """Queries, keys, values and the result, which attention and the projection after it both keep."""
    queries = model.num_attention_heads * model.head_size / plan.tp
    keys = max(1.0, model.kv_heads / plan.tp) * model.head_size
    # Eager attention repeats grouped keys and values for every head.
    keys = keys if execution.fused_kernels else queries
    element = element_bytes(plan)
    own_copy = product if product < element else 0.0
    sums = 4.0 * model.num_attention_heads / plan.tp
    return element * (2 * queries + 2 * keys) + own_copy * queries + sums


def _latent(model: ModelSpec, mla: MlaSpec, plan: Plan, product: float) -> tuple[float, float]:
    """Latents with their norms and the result; queries, keys and values made from them (DeepSeek-V2, section 2.1)."""
    heads, element = model.num_attention_heads / plan.tp, element_bytes(plan)
    latents = (element + product) * (mla.q_lora_rank + mla.kv_lora_rank) + element * mla.qk_rope_head_dim
    queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    result = heads * mla.v_head_dim
    return latents / _split(plan) + element * result + 4 * heads, element * (2 * queries + values)


def _score_bytes(model: ModelSpec, plan: Plan, training: TrainingSpec, execution: Execution) -> float:
    if execution.attention not in _SCORES:
        return 0.0
    extra, copies = _SCORES[execution.attention]
    width = extra + copies * element_bytes(plan)
    if execution.dropout:
        width += 1 + element_bytes(plan)  # the mask, and what it leaves
    return width * training.sequence_length * model.num_attention_heads / plan.tp


def _mlp(model: ModelSpec, execution: Execution) -> tuple[int, int]:
    """Return widths kept by the activation, and as input of the product after it."""
    if not model.gated_mlp:
        return 1, 1
    return (2, 1) if execution.fused_kernels and not execution.eager_activation else (3, 1)


def _expert_parts(model: ModelSpec, moe: MoeSpec, plan: Plan, execution: Execution) -> dict[str, float]:
    """Tokens sent to the experts of a rank, under a balanced router, and what the experts make of them."""
    element, product = element_bytes(plan), _input_bytes(plan, execution)
    routed = moe.top_k * plan.etp / plan.tp
    up, down = _mlp(model, execution)
    width = moe.expert_ffn_hidden_size / plan.etp
    shared = moe.shared_ffn_hidden_size / plan.tp
    return {
        "moe_act": product * down * (routed * width + shared),
        "moe": routed * (product * model.hidden_size + element * up * width + _ROUTED_TOKEN_BYTES),
        "router": _ROUTER_BYTES * moe.num_experts / _split(plan),
        "shared_experts": element * up * shared,
    }


def _operators_kept(model: ModelSpec, plan: Plan, *, moe: bool) -> float:
    """PyTorch's per-operator policy: the input, attention's result, and every second matrix product's output."""
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_size
    keys, width = model.kv_heads * model.head_size, model.ffn_hidden_size
    if moe and model.moe:
        width = model.moe.top_k * model.moe.expert_ffn_hidden_size + model.moe.shared_ffn_hidden_size
    # In order: queries, keys, values, output, gate, up, down; the first of each pair is kept.
    return element_bytes(plan) * (2 * hidden / _split(plan) + (2 * queries + keys + width) / plan.tp)


def _working(
    model: ModelSpec, plan: Plan, training: TrainingSpec, execution: Execution, *, moe: bool
) -> float:
    """Gradients while the layer's widest block is differentiated, and the hidden states' own."""
    element = element_bytes(plan)
    gates = 2 if model.gated_mlp else 1
    width = model.ffn_hidden_size / plan.tp
    if moe and model.moe:
        routed = model.moe.top_k * plan.etp / plan.tp
        width = routed * model.moe.expert_ffn_hidden_size / plan.etp + model.hidden_size * routed / gates
    queries = model.num_attention_heads * model.head_size / plan.tp
    if model.mla:
        queries *= (model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim) / model.head_size
    attention = element * 4 * queries
    if execution.attention in _SCORE_GRADIENTS:
        extra, copies = _SCORE_GRADIENTS[execution.attention]
        scores = training.sequence_length * model.num_attention_heads / plan.tp
        attention += (extra + copies * element) * scores
    return max(element * gates * width, attention) + 2 * element * model.hidden_size
