"""Seconds of arithmetic on one rank: a roofline by operator, with efficiencies that depend on its shape.

A layer is a list of matrix products, fused attention, and element-wise kernels. Products run at a share of the peak
that falls with their smallest side; kernels without reuse run at a share of the memory bandwidth; what is too small
for the device waits for the host that launches it (`Efficiency` holds the shares, hydra_configs/efficiency/ the data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.cluster.spec import GpuSpec
from launcher.planner.price.activations import element_bytes, tokens_of
from launcher.planner.price.stages import StageShape
from strategies.base import Execution
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, Precision, TrainingSpec

# Kernels of one layer's forward pass, fused and not: norms, products, rotary embedding, attention, activation, sums.
_KERNELS = {True: 14, False: 36}
_EXPERT_KERNELS = {True: 20, False: 60}  # routing, permutation and back
# Share of the host's launches that remains under CUDA graphs.
_LAUNCHED = {"none": 1.0, "partial": 0.6, "full": 0.0}
# Dispatchers that send by themselves, and permute in fused kernels, leave the host less to wait for.
_FUSED_DISPATCH_STALL = 0.3
# The backward pass of fused attention computes five products where the forward pass computes two
# (FlashAttention-2, section 3.1).
_ATTENTION_BACKWARD = 2.5
# Attention that stores its scores computes the full square.
_SQUARE = {"fused_softmax": 2.0, "unfused": 2.0}
_NARROW = ("fp8", "nvfp4")
# How often it reads or writes them, forward: product, scale, mask, softmax, product.
_SCORE_PASSES = {"fused_softmax": 4, "unfused": 10}


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """One layer, one micro-batch, one rank."""

    forward: float
    backward: float
    parts: dict[
        str, float
    ]  # forward seconds of what selective recomputation may repeat, in Megatron-core's words


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Device seconds."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: _Work) -> _Work:
        return _Work(forward=self.forward + other.forward, backward=self.backward + other.backward)


def peak_flops(gpu: GpuSpec, precision: Precision) -> float:
    """FLOP/s that the data sheet promises; a CPU runs every precision at the speed of fp32."""
    return gpu.peak_tflops.get(precision, gpu.peak_tflops.get("fp32", 0.0)) * 1e12


class Compute:
    """Times the layers of one model on one device; what plans share is computed once."""

    def __init__(self, model: ModelSpec, training: TrainingSpec, gpu: GpuSpec, execution: Execution) -> None:
        self._model, self._training, self._gpu, self._execution = model, training, gpu, execution
        self._layers: dict[tuple[object, ...], LayerSeconds] = {}
        self._heads: dict[tuple[object, ...], tuple[float, float]] = {}
        efficiency = gpu.efficiency
        self._bytes_per_s = gpu.memory_gb_per_s * 1e9 * efficiency.memory
        launched = _LAUNCHED[execution.cuda_graphs]
        self._kernel_s = launched * efficiency.kernel_us * 1e-6
        self._stall_s = launched * efficiency.moe_stall_ms * 1e-3
        if execution.deduplicated_dispatch:
            self._stall_s *= _FUSED_DISPATCH_STALL
        self._scores = model.attention_flops_per_token(training.sequence_length)

    def layer(self, plan: Plan, *, moe: bool) -> LayerSeconds:
        """Return the seconds of one layer under the degrees and the micro-batch of `plan`."""
        key = (
            plan.micro_batch_size,
            plan.cp,
            plan.tp,
            plan.etp,
            plan.ep,
            plan.sequence_parallel,
            plan.precision,
            moe,
        )
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = self._time_layer(plan, moe=moe)
        return found

    def head(self, plan: Plan) -> tuple[float, float]:
        """Return forward and backward seconds of the output projection and the loss."""
        key = (plan.micro_batch_size, plan.cp, plan.tp, plan.precision)
        found = self._heads.get(key)
        if found is None:
            found = self._heads[key] = self._time_head(plan)
        return found

    def embedding(self, plan: Plan) -> tuple[float, float]:
        """Return forward and backward seconds of looking tokens up: rows read, and their gradients added."""
        width = tokens_of(plan, self._training) * self._model.hidden_size * element_bytes(plan)
        return 2 * width / self._bytes_per_s, 4 * width / self._bytes_per_s

    def optimizer(self, *, state_bytes: float) -> float:
        """Seconds of Adam and clipping over weights, gradients and moments: read and written once, norms read once."""
        return 2.2 * state_bytes / self._bytes_per_s

    def _time_layer(self, plan: Plan, *, moe: bool) -> LayerSeconds:
        model, fused = self._model, self._execution.fused_kernels
        tokens = tokens_of(plan, self._training)
        projections, ups = self._projections(plan, tokens)
        attention = self._attention(plan, tokens)
        norms = self._elementwise(plan, tokens, *self._norm_elements(plan))
        if moe and model.moe:
            feed, activation = self._experts(plan, tokens, model.moe)
            kernels = _KERNELS[fused] + _EXPERT_KERNELS[fused]
        else:
            feed = self._mlp(plan, tokens, model.ffn_hidden_size / plan.tp)
            activation = self._activation(plan, tokens * model.ffn_hidden_size / plan.tp)
            kernels = _KERNELS[fused]
        whole = projections + attention + norms + feed + activation
        host = kernels * self._kernel_s
        stall = self._stall_s if moe else 0.0
        mlp = feed.forward + activation.forward
        return LayerSeconds(
            forward=self._launched(whole.forward, host) + 0.4 * stall,
            backward=self._launched(whole.backward, 1.5 * host) + 0.6 * stall,
            parts={
                "core_attn": attention.forward,
                "mla_up_proj": ups,
                "layernorm": norms.forward / 2,
                "moe_act": activation.forward,
                "mlp": 0.0 if moe else mlp,
                "moe": mlp if moe else 0.0,
            },
        )

    def _launched(self, device_s: float, host_s: float) -> float:
        """The host launches ahead of the device, unless it is the device itself."""
        return device_s + host_s if self._gpu.device == "cpu" else max(device_s, host_s)

    def _projections(self, plan: Plan, tokens: float) -> tuple[_Work, float]:
        """Time the products around attention; also return the forward seconds of MLA's up projections."""
        model, hidden = self._model, self._model.hidden_size
        if model.mla is None:
            width = model.num_attention_heads * model.head_size / plan.tp
            keys = 2 * max(1.0, model.kv_heads / plan.tp) * model.head_size
            return self._product(plan.precision, tokens, width + keys, hidden) + self._product(
                plan.precision, tokens, hidden, width
            ), 0.0
        mla, heads = model.mla, model.num_attention_heads / plan.tp
        qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        down = self._product(
            plan.precision, tokens, mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim, hidden
        )
        up = self._product(plan.precision, tokens, heads * qk, mla.q_lora_rank or hidden)
        up += self._product(
            plan.precision, tokens, heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank
        )
        return down + up + self._product(plan.precision, tokens, hidden, heads * mla.v_head_dim), up.forward

    def _mlp(self, plan: Plan, tokens: float, width: float) -> _Work:
        hidden = self._model.hidden_size
        up = (2 if self._model.gated_mlp else 1) * width
        return self._product(plan.precision, tokens, up, hidden) + self._product(
            plan.precision, tokens, hidden, width
        )

    def _experts(self, plan: Plan, tokens: float, moe: MoeSpec) -> tuple[_Work, _Work]:
        """Time routing, permutation, the experts of the busiest rank, and what all tokens share."""
        model = self._model
        routed = tokens * moe.top_k * plan.etp / plan.tp * self._execution.expert_imbalance
        local = max(1.0, moe.num_experts / plan.ep)
        width = moe.expert_ffn_hidden_size / plan.etp
        grouped = self._grouped(plan, routed / local, width, local)
        shared = (
            self._mlp(plan, tokens, moe.shared_ffn_hidden_size / plan.tp)
            if moe.shared_ffn_hidden_size
            else _Work()
        )
        router = self._product(plan.precision, tokens / plan.tp, moe.num_experts, model.hidden_size)
        # Permuted and sent, received and sorted by expert, and the same way back: four copies of every routed token.
        moved = self._elementwise(plan, 1, 8 * routed * model.hidden_size)
        activation = self._activation(plan, routed * width + tokens * moe.shared_ffn_hidden_size / plan.tp)
        return grouped + shared + router + moved, activation

    def _grouped(self, plan: Plan, rows: float, width: float, count: float) -> _Work:
        """`count` experts side by side in one grouped product."""
        hidden, efficiency = self._model.hidden_size, self._gpu.efficiency
        share = efficiency.grouped_narrow if plan.precision in _NARROW else efficiency.grouped_matmul
        one = self._product(
            plan.precision, rows, (2 if self._model.gated_mlp else 1) * width, hidden, launches=1 / count
        )
        one += self._product(plan.precision, rows, hidden, width, launches=1 / count)
        return _Work(forward=count * one.forward / share, backward=count * one.backward / share)

    def _product(
        self, precision: Precision, rows: float, columns: float, inner: float, *, launches: float = 1.0
    ) -> _Work:
        """One matrix product; its backward pass makes two of the same size, or one where weights are frozen."""
        efficiency = self._gpu.efficiency
        rate = peak_flops(self._gpu, precision) * efficiency.matmul_share(precision)
        shape = 1 + efficiency.matmul_half_size * (1 / rows + 1 / columns + 1 / inner)
        if columns % 64 or inner % 64:
            shape /= efficiency.misaligned_matmul
        arithmetic = 2 * rows * columns * inner / rate * shape
        element = 4 if precision == "fp32" else 2
        traffic = (rows * (columns + inner) + columns * inner) * element
        moved, start = traffic / self._bytes_per_s, launches * efficiency.matmul_us * 1e-6
        forward = max(arithmetic, moved) + start
        # Activations and gradients are read in 16 bits and written in the narrow format twice, once transposed.
        narrow = precision in _NARROW
        quantised = 4 * rows * inner / self._bytes_per_s if narrow else 0.0
        quantised_back = 4 * rows * columns / self._bytes_per_s if narrow else 0.0
        # Weight gradients are added to fp32 sums, which are read and written: beside the product's own arithmetic
        # where it is fused with the addition, after it elsewhere.
        sums = 8 * columns * inner / self._bytes_per_s
        fused = self._execution.fused_accumulation
        weights = start + (max(arithmetic, moved + sums) if fused else max(arithmetic, moved) + sums)
        both = forward if self._execution.frozen_weights else forward + weights
        return _Work(forward=forward + quantised, backward=both + quantised_back)

    def _attention(self, plan: Plan, tokens: float) -> _Work:
        efficiency, execution = self._gpu.efficiency, self._execution
        # 16 bits whatever the products around it use.
        precision = _wide(plan.precision)
        length, kernel = self._training.sequence_length, execution.attention
        flops = tokens * self._scores / plan.tp * _SQUARE.get(kernel, 1.0)
        share = efficiency.attention_share("unfused" if kernel in _SQUARE else kernel)
        # Narrow heads leave tensor cores waiting for the exponentials (FlashAttention-3, section 1).
        tiles = tokens / 128 * self._model.num_attention_heads / plan.tp
        shape = (1 + efficiency.attention_half_tiles / tiles) * (1 + 64 / length)
        mla = self._model.mla
        width = mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else self._model.head_size
        shape *= (1 + 32 / width) / 1.25
        if plan.cp > 1 and not execution.heads_over_cp:
            shape /= efficiency.ring_attention ** math.log2(plan.cp)
        forward = flops * shape / (peak_flops(self._gpu, precision) * share)
        backward = _ATTENTION_BACKWARD * forward / efficiency.attention_backward
        if execution.attention in _SCORE_PASSES:
            # Scores, masked, exponentiated, summed: written and read several times at full square.
            heads = self._model.num_attention_heads / plan.tp
            traffic = tokens * length * heads * element_bytes(plan) * _SCORE_PASSES[execution.attention]
            forward += traffic / self._bytes_per_s
            backward += 1.5 * traffic / self._bytes_per_s
        return _Work(forward=forward, backward=backward)

    def _norm_elements(self, plan: Plan) -> tuple[float, float]:
        """Return elements read and written for one token: two norms and sums, and the heads that are rotated."""
        model, fused = self._model, self._execution.fused_kernels
        split = plan.tp if plan.sequence_parallel else 1
        # RMSNorm by torch's own operators goes through fp32 and back in eight kernels; LayerNorm is one.
        norm = 2.0 if fused or model.norm == "layernorm" else self._gpu.efficiency.unfused_norm
        heads = (model.num_attention_heads + model.kv_heads) * model.head_size / plan.tp
        rotated = 0.0 if model.learned_positions else (2 if fused else 8) * heads
        return 2 * (norm + 3) * model.hidden_size / split, rotated

    def _activation(self, plan: Plan, elements: float) -> _Work:
        gated, fused = self._model.gated_mlp, self._execution.fused_kernels
        return self._elementwise(plan, 1, ((3 if fused else 5) if gated else 2) * elements)

    def _elementwise(self, plan: Plan, tokens: float, *elements: float) -> _Work:
        """Kernels without reuse: the forward pass moves so many elements a token, the backward pass 1.5 times."""
        seconds = tokens * sum(elements) * element_bytes(plan) / self._bytes_per_s
        return _Work(forward=seconds, backward=1.5 * seconds)

    def _time_head(self, plan: Plan) -> tuple[float, float]:
        model = self._model
        tokens, vocabulary = tokens_of(plan, self._training), model.vocab_size / plan.tp
        # The head stays in 16 bits under fp8 recipes.
        precision = _wide(plan.precision)
        product = self._product(precision, tokens, vocabulary, model.hidden_size)
        # Logits are read for the maximum, the sum and the loss, in fp32 where they are not fused.
        passes = 3 if self._execution.fused_kernels else 8
        loss = passes * tokens * vocabulary * 4 / self._bytes_per_s
        return product.forward + loss, product.backward + loss


def _wide(precision: Precision) -> Precision:
    """Return the precision of what stays in 16 bits under a narrow one."""
    return "bf16" if precision in _NARROW else precision


def stage_seconds(compute: Compute, plan: Plan, stage: StageShape) -> tuple[float, float]:
    """Return forward and backward seconds of one micro-batch on one rank of `stage`, nothing recomputed."""
    forward = backward = 0.0
    for count, moe in ((stage.dense_layers, False), (stage.moe_layers, True)):
        if count:
            layer = compute.layer(plan, moe=moe)
            forward += count * layer.forward
            backward += count * layer.backward
    for has, times in ((stage.has_embedding, compute.embedding), (stage.has_head, compute.head)):
        if has:
            seconds = times(plan)
            forward += seconds[0]
            backward += seconds[1]
    return forward, backward
