"""Seconds of one step by part: the slowest stage's work, plus the communication that nothing hides."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.cluster.spec import ClusterSpec
from launcher.planner.collectives import Group, groups_of
from launcher.planner.compute import StageSeconds, optimizer_seconds, stage_seconds
from launcher.planner.cost import MemoryCost, TimeCost
from launcher.planner.memory import element_bytes
from launcher.planner.stages import StageShape, expert_replicas
from strategies.base import StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

# Communication that runs beside computation takes part of the device from it, so not all of it hides.
_OVERLAP = 0.8
# Hooks, bucket copies and launches of the sharded stages: for each layer and collective, on the host.
_SHARDING_S_PER_LAYER = 100e-6
# PCIe 4.0 x16 in practice, and a host core group's share of memory bandwidth for the CPU's Adam.
_HOST_LINK_BYTES_PER_S = 20e9
_HOST_ADAM_BYTES_PER_S = 20e9


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    model: ModelSpec
    plan: Plan
    training: TrainingSpec
    state: StateBytes
    stage: StageShape
    seconds: StageSeconds
    groups: dict[str, Group]

    @property
    def message_bytes(self) -> float:
        """Hidden states of one micro-batch on one rank."""
        tokens = self.plan.micro_batch_size * self.training.sequence_length / self.plan.cp
        return tokens * self.model.hidden_size * element_bytes(self.plan)

    @property
    def passes(self) -> int:
        """Forward passes of a layer's communication per micro-batch; the backward pass repeats it."""
        return 3 if self.plan.recompute == "full" else 2


def step_time(
    model: ModelSpec,
    *,
    plan: Plan,
    training: TrainingSpec,
    cluster: ClusterSpec,
    state: StateBytes,
    memory: MemoryCost,
    host_bytes: float,
    stages: tuple[StageShape, ...],
) -> TimeCost:
    """Return the seconds of one step. `memory` and `host_bytes` are those of the fullest stage."""
    gpu = cluster.gpu
    timed = [
        (stage_seconds(model, plan=plan, training=training, gpu=gpu, stage=stage), stage) for stage in stages
    ]
    seconds, stage = max(timed, key=lambda item: item[0].forward)
    groups = groups_of(cluster, plan)
    inputs = _Inputs(
        model=model, plan=plan, training=training, state=state, stage=stage, seconds=seconds, groups=groups
    )
    count = plan.num_microbatches
    compute = count * 3 * seconds.forward
    recompute = count * {"none": 0.0, "selective": seconds.attention, "full": seconds.layers}[plan.recompute]
    tp, cp, ep = (count * part(inputs) for part in (_tensor_s, _context_s, _expert_s))
    busy = compute + recompute + tp + cp + ep
    return TimeCost(
        compute=compute,
        recompute=recompute,
        tp=tp,
        cp=cp,
        ep=ep,
        pp=_pipeline_s(inputs),
        dp=_data_s(inputs),
        # Narayanan et al. 2021, section 2.2: (p - 1) / (v * m) of the working time.
        bubble=busy * (plan.pp - 1) / (plan.vp * count),
        optimizer=optimizer_seconds(gpu, state_bytes=memory.weights + memory.gradients + memory.optimizer),
        offload=_offload_s(plan, state, stage, host_bytes),
    )


def _tensor_s(inputs: _Inputs) -> float:
    """Two all-reduces a layer and pass (Shoeybi et al. 2019, section 3), or what sequence parallel makes of them."""
    return (
        inputs.passes * inputs.stage.num_layers * 2 * inputs.groups["tp"].all_reduce_s(inputs.message_bytes)
    )


def _context_s(inputs: _Inputs) -> float:
    """Ring attention: keys and values travel round the ring beside the attention of the block at hand."""
    plan, model = inputs.plan, inputs.model
    if plan.cp == 1:
        return 0.0
    width = 2 * model.kv_heads * model.head_size / plan.tp / model.hidden_size
    ring = (plan.cp - 1) * inputs.groups["cp"].send_s(inputs.message_bytes * width)
    hidden = _OVERLAP * inputs.seconds.attention / max(1, inputs.stage.num_layers)
    return inputs.passes * inputs.stage.num_layers * max(0.0, ring - hidden)


def _expert_s(inputs: _Inputs) -> float:
    """Tokens to their experts and back, two all-to-alls a layer and pass."""
    if inputs.model.moe is None:
        return 0.0
    share = inputs.plan.tp if inputs.plan.sequence_parallel else 1
    routed = inputs.message_bytes * inputs.model.moe.top_k / share
    return inputs.passes * inputs.stage.moe_layers * 2 * inputs.groups["ep"].all_to_all_s(routed)


def _pipeline_s(inputs: _Inputs) -> float:
    """Every micro-batch crosses each chunk's border forward and backward; the warm-up crosses all stages."""
    plan = inputs.plan
    share = plan.tp if plan.sequence_parallel else 1
    crossings = 2 * plan.vp * plan.num_microbatches + 2 * (plan.pp - 1)
    return crossings * inputs.groups["pp"].send_s(inputs.message_bytes / share)


def _data_s(inputs: _Inputs) -> float:
    """Gradients (and with ZeRO weights) between the ranks that hold the same ones, less what the backward pass hides.

    ZeRO paper, section 7: stages 0 to 2 move each gradient and each weight once, stage 3 gathers the weights for the
    forward and the backward pass. From stage 2 on, gradients are sharded, hence reduced after every micro-batch
    (unless the engine keeps them whole). One collective for each layer, about what the engines' buckets make.
    """
    plan, state, group = inputs.plan, inputs.state, inputs.groups["state"]
    if group.size == 1:
        return 0.0
    experts = inputs.stage.expert_parameters if expert_replicas(plan) > 1 else 0.0
    parameters = inputs.stage.parameters + experts
    backward = 2 * inputs.seconds.forward
    layers = max(1, inputs.stage.num_layers)
    reduce = group.all_gather_s(parameters * state.gradients, calls=layers)
    gather = group.all_gather_s(parameters * (state.gathered or state.weights), calls=layers)
    if plan.zero_stage >= 2:
        return _sharded_s(inputs, layers=layers, gather=gather, reduce=reduce)
    if plan.zero_stage == 1:
        return _exposed(reduce, backward, layers) + gather
    return _exposed(group.all_reduce_s(parameters * state.gradients, calls=layers), backward, layers)


def _sharded_s(inputs: _Inputs, *, layers: int, gather: float, reduce: float) -> float:
    """Stages 2 and 3: the last micro-batch always reduces, the others unless gradients are kept whole."""
    count, state = inputs.plan.num_microbatches, inputs.state
    hooks = layers * _SHARDING_S_PER_LAYER
    reductions = 1 if state.whole_gradients else count
    backward = 2 * inputs.seconds.forward
    forward_s = _exposed(gather, inputs.seconds.forward, layers) + hooks
    reduce_s = _exposed(reduce, backward, layers) + hooks
    if inputs.plan.zero_stage == 3:
        both_s = _exposed(gather + reduce, backward, layers) + 2 * hooks
        alone_s = _exposed(gather, backward, layers) + hooks
        return count * forward_s + reductions * both_s + (count - reductions) * alone_s
    gathers_s = count * forward_s if state.regathers else gather + hooks
    return reductions * reduce_s + gathers_s


def _exposed(communication: float, computation: float, num_layers: int) -> float:
    """What remains beside computation; the share of one layer always does, as nothing is left to hide it."""
    return max(communication - _OVERLAP * computation, communication / num_layers)


def _offload_s(plan: Plan, state: StateBytes, stage: StageShape, host_bytes: float) -> float:
    """Gradients down, weights up, and Adam at the host's pace; offloaded weights travel for every pass."""
    seconds = 0.0
    ranks = plan.dp * plan.cp
    owned = (stage.parameters + stage.expert_parameters) / (ranks if plan.zero_stage >= 1 else 1)
    if plan.offload_optimizer:
        seconds += owned * (state.gradients + state.weights) / _HOST_LINK_BYTES_PER_S
        seconds += 2 * owned * state.optimizer / _HOST_ADAM_BYTES_PER_S
    if plan.offload_parameters:
        seconds += 2 * plan.num_microbatches * owned * state.weights / _HOST_LINK_BYTES_PER_S
    return seconds
