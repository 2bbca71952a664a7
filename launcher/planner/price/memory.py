"""Bytes per rank, from first principles: states by ZeRO stage, activations in flight, the loss' workspace, buffers.

States: Rajbhandari et al. 2020 (ZeRO), section 3 and figure 1, with the widths of `StateBytes`. Activations: see
activations.py. What PyTorch's allocator holds beyond what is in use is counted; the device context and communicators
live outside of it, in `ClusterSpec.reserved_gib`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.planner.cost import MemoryCost
from launcher.planner.price.activations import LayerBytes, element_bytes, layer_bytes, tokens_of
from launcher.planner.price.stages import StageShape, owned_parameters
from strategies.base import Capabilities, Execution, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Precision, TrainingSpec

# What PyTorch's allocator holds beyond what is in use, as shares of what stays and of what comes and goes.
_STATE_SLACK = 0.03
_WORKING_SLACK = 0.08


class MemoryModel:
    """Bytes of the plans of one problem; what plans share is computed once."""

    def __init__(self, model: ModelSpec, training: TrainingSpec, capabilities: Capabilities) -> None:
        self._model, self._training, self._capabilities = model, training, capabilities
        self._execution: Execution = capabilities.execution
        self._layers: dict[tuple[object, ...], LayerBytes] = {}

    def layer(self, plan: Plan, *, moe: bool) -> LayerBytes:
        """Return what one layer costs under the degrees, the micro-batch and the recomputation of `plan`."""
        key = (
            moe,
            plan.micro_batch_size,
            plan.tp,
            plan.cp,
            plan.etp,
            plan.sequence_parallel,
            plan.recompute,
            plan.recompute_modules,
            plan.precision,
        )
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = layer_bytes(
                self._model, plan=plan, training=self._training, execution=self._execution, moe=moe
            )
        return found

    def of(self, plan: Plan, stage: StageShape) -> tuple[MemoryCost, float]:
        """Return bytes on the device and bytes on the host, for one rank of `stage`."""
        state = self._capabilities.state_bytes_of(plan)
        if self._capabilities.shards_whole_experts and self._model.moe:
            stage = replace(stage, expert_pieces=self._model.moe.num_experts // plan.ep)
        if self._execution.frozen_weights:
            # The adapters' own are a hundredth of the weights or less.
            state = replace(
                state, gradients=0.0, gradient_copies=0.0, fresh_gradients=0.0, optimizer=0.0, step=0.0
            )
        (weights, gradients, optimizer), host = _states(plan, state, stage)
        loss = self._loss(plan) if stage.has_head else 0.0
        passing = _gradients_in_flight(plan, state, stage)
        if plan.nvme_path:
            host = self._swap_buffers(plan, state, stage)
        kept, backward = self._activations(plan, stage)
        # The loss' workspace is free again before the first layer's backward pass begins.
        activations = kept + max(0.0, backward + passing - loss)
        buffers = self._buffers(plan, state, stage)
        slack = _STATE_SLACK * (weights + gradients + optimizer)
        slack += _WORKING_SLACK * (activations + loss + buffers)
        return MemoryCost(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            logits=loss,
            buffers=buffers,
            slack=slack,
        ), host

    def disk_bytes(self, plan: Plan, stage: StageShape) -> float:
        """Return what one rank of `stage` keeps on a disk: states, and the gradients that the optimizer reads there."""
        if not plan.nvme_path:
            return 0.0
        state, owned = self._capabilities.state_bytes_of(plan), owned_parameters(stage, plan)
        width = (state.gradients + state.optimizer) * plan.offload_optimizer
        return owned * (width + state.weights * plan.offload_parameters)

    def _swap_buffers(self, plan: Plan, state: StateBytes, stage: StageShape) -> float:
        """Host memory beside a disk: the optimizer's states at hand, all gradients, and weights on their way."""
        owned, host = owned_parameters(stage, plan), 0.0
        if plan.offload_optimizer:
            at_hand = min(owned, self._capabilities.swapped_elements)
            host += at_hand * (state.gradients + state.optimizer) + owned * state.host
        if plan.offload_parameters:
            host += min(owned, stage.layer_parameters) * state.weights
        return host

    def least_bytes(self, plan: Plan, stages: Sequence[StageShape], *, offload: bool = True) -> float:
        """Return a lower bound of the fullest stage's total, cheaper than that total.

        It holds for every recomputation and ZeRO stage of the engine, and with `offload` also for every offloading it
        allows, as long as degrees, micro-batches, precision and the layers of the stages stay those of `plan`. Counted
        are the states under the ZeRO stage that leaves least of them, the inputs of layers, the loss and the pipeline's
        messages; what is left out (gathered weights, buckets, one layer's backward pass) is never negative.
        """
        return max(self._least(plan, stage, offload=offload) for stage in stages)

    def _least(self, plan: Plan, stage: StageShape, *, offload: bool) -> float:
        states = min(
            self._least_states(plan, stage, zero, offload=offload) for zero in self._capabilities.zero_stages
        )
        kept = min(self.layer(plan, moe=False).least, self.layer(plan, moe=stage.moe_layers > 0).least)
        kept *= stage.num_layers * self._on_device(stage) * micro_batches_in_flight(plan, stage.index)
        loss = self._loss(plan) if stage.has_head else 0.0
        return (1 + _STATE_SLACK) * states + (1 + _WORKING_SLACK) * (kept + loss + self._messages(plan))

    def _least_states(self, plan: Plan, stage: StageShape, zero: int, *, offload: bool) -> float:
        weights, gradients, optimizer = self._widths(plan.precision, zero)
        if offload and zero in self._capabilities.offload_parameters_stages:
            weights = 0.0
        if offload and zero in self._capabilities.offload_optimizer_stages:
            gradients, optimizer = gradients * (zero < 2), 0.0
        sharded = weights * (zero >= 3) + gradients * (zero >= 2) + optimizer * (zero >= 1)
        whole = weights + gradients + optimizer - sharded
        return sharded * owned_parameters(stage, plan) + whole * stage.all_parameters

    def _widths(self, precision: Precision, zero_stage: int) -> tuple[float, float, float]:
        """Bytes of weights, gradients and optimizer state that one parameter costs at least."""
        capabilities = self._capabilities
        state = capabilities.stage_state_bytes.get(
            (precision, zero_stage), capabilities.state_bytes[precision]
        )
        trained = 0.0 if self._execution.frozen_weights else 1.0
        return state.weights, trained * state.gradients, trained * state.optimizer

    def _on_device(self, stage: StageShape) -> float:
        """Share of the layers whose activations stay on the device."""
        return 1 - min(1.0, self._execution.offloaded_layers / max(1, stage.num_layers))

    def _activations(self, plan: Plan, stage: StageShape) -> tuple[float, float]:
        """Return what is kept at the fullest moment, and what the backward pass of one layer needs beside it."""
        dense = self.layer(plan, moe=False)
        moe = self.layer(plan, moe=True) if stage.moe_layers else dense
        some = plan.recompute == "full" and plan.recompute_num_layers
        recomputed = min(plan.recompute_num_layers, stage.num_layers) if some else stage.num_layers
        recomputed_dense = min(recomputed, stage.dense_layers)
        recomputed_moe = recomputed - recomputed_dense
        kept = recomputed_dense * dense.kept + recomputed_moe * moe.kept
        kept += (stage.dense_layers - recomputed_dense) * dense.whole
        kept += (stage.moe_layers - recomputed_moe) * moe.whole
        kept *= self._on_device(stage)
        if stage.has_head:
            kept += 2 * dense.input  # the last norm's input and result
        backward = max(
            dense.backward if stage.dense_layers else 0.0, moe.backward if stage.moe_layers else 0.0
        )
        return micro_batches_in_flight(plan, stage.index) * kept, backward

    def _loss(self, plan: Plan) -> float:
        """All copies of the logits at the loss' peak."""
        width = self._execution.bytes_per_logit
        if width is None:
            element = element_bytes(plan)
            copies = 4 if self._execution.fused_kernels else 12
            width = element + copies if element < 4 else copies
        split = 1 if self._execution.gathered_logits else plan.tp
        return tokens_of(plan, self._training) * self._model.vocab_size * width / split

    def _buffers(self, plan: Plan, state: StateBytes, stage: StageShape) -> float:
        """Gathered weights, communication buckets, the optimizer's copies, pipeline messages."""
        everything = stage.all_parameters
        buffers = _gathered(plan, state, stage)
        if not plan.offload_optimizer:
            buffers += _sharded(stage, plan, state.step, sharded=plan.zero_stage >= 1)
        if state.fresh_gradients:
            # Experts' gradients are added up where they are made.
            fresh = max(self._model.dense_layer_parameters, self._model.moe_layer_parameters(0)) / plan.tp
            fresh += self._model.vocab_size * self._model.hidden_size / plan.tp if stage.has_head else 0.0
            buffers += min(everything, fresh) * state.fresh_gradients
        if plan.zero_stage > 0:
            elements = self._capabilities.buffer_elements_of(plan)
            buffers += min(elements, everything) * state.gradients
        return buffers + self._messages(plan)

    def _messages(self, plan: Plan) -> float:
        """Hidden states of one micro-batch, arriving and leaving."""
        if plan.pp == 1:
            return 0.0
        split = plan.tp if plan.sequence_parallel else 1
        width = self._model.hidden_size * element_bytes(plan) / split
        return 2 * tokens_of(plan, self._training) * width


def stage_memory(
    model: ModelSpec,
    *,
    plan: Plan,
    training: TrainingSpec,
    state: StateBytes,
    stage: StageShape,
    bucket_elements: int = 0,
    execution: Execution | None = None,
) -> tuple[MemoryCost, float]:
    """Return bytes on the device and bytes on the host, for one rank of `stage`, without a `MemoryModel`."""
    capabilities = Capabilities(
        zero_stages=frozenset({plan.zero_stage}),
        precisions=frozenset({plan.precision}),
        recompute=frozenset({plan.recompute}),
        state_bytes={plan.precision: state},
        execution=execution or Execution(),
        buffer_elements=bucket_elements,
    )
    return MemoryModel(model, training, capabilities).of(plan, stage)


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


def _states(plan: Plan, state: StateBytes, stage: StageShape) -> tuple[tuple[float, float, float], float]:
    """Return weights, gradients and optimizer state on the device, and what of them lies on the host."""
    weights = _sharded(stage, plan, state.weights, sharded=plan.zero_stage >= 3)
    gradients = _sharded(stage, plan, state.gradients, sharded=_shards_gradients(plan, state))
    optimizer = _sharded(stage, plan, state.optimizer, sharded=plan.zero_stage >= 1)
    host = 0.0
    if plan.offload_parameters:
        host, weights = weights, 0.0
    if plan.offload_optimizer:
        host, optimizer = host + optimizer, 0.0
        host += _sharded(stage, plan, state.host, sharded=plan.zero_stage >= 1)
        if plan.zero_stage >= 2:
            # Sharded gradients follow the optimizer, which reads them on the host (ZeRO-Offload, section 4).
            host, gradients = host + gradients, 0.0
    gradients += stage.all_parameters * state.gradient_copies
    return (weights, gradients, optimizer), host


def _gathered(plan: Plan, state: StateBytes, stage: StageShape) -> float:
    """Weights that are whole for a moment: those of the layer in use and the next one, and the root unit."""
    everything = stage.all_parameters
    unit = min(everything, 2 * stage.layer_parameters + stage.root_parameters)
    gathered = (everything if state.keep_gathered else unit) * state.gathered
    if plan.zero_stage >= 3 and not state.gathered:
        missing = everything if plan.offload_parameters else _missing(plan, stage)
        gathered += min(unit, missing) * state.weights
    return gathered


def _gradients_in_flight(plan: Plan, state: StateBytes, stage: StageShape) -> float:
    """Gradients of the same layers before they are reduced and sharded."""
    if not _shards_gradients(plan, state):
        return 0.0
    unit = 2 * stage.layer_parameters + stage.root_parameters
    return min(unit, _missing(plan, stage)) * state.gradients


def _missing(plan: Plan, stage: StageShape) -> float:
    """Parameters of the stage that live on other ranks when all is sharded."""
    return stage.all_parameters - owned_parameters(stage, plan)


def _shards_gradients(plan: Plan, state: StateBytes) -> bool:
    return plan.zero_stage >= 2 and not state.whole_gradients


def _sharded(stage: StageShape, plan: Plan, bytes_per_parameter: float, *, sharded: bool) -> float:
    return (owned_parameters(stage, plan) if sharded else stage.all_parameters) * bytes_per_parameter
