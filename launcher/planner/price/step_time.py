"""Seconds of one step by part: the slowest stage's work, plus the communication that nothing hides."""

from __future__ import annotations

from launcher.cluster.spec import ClusterSpec
from launcher.planner.cost import MemoryCost, TimeCost
from launcher.planner.price.activations import element_bytes, tokens_of
from launcher.planner.price.collectives import Group, groups_of
from launcher.planner.price.compute import Compute, stage_seconds
from launcher.planner.price.stages import StageShape, owned_parameters, stage_kinds
from strategies.base import Execution, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

# PCIe 4.0 x16 in practice, and a host core group's share of memory bandwidth for the CPU's Adam.
_HOST_LINK_BYTES_PER_S = 20e9
_HOST_ADAM_BYTES_PER_S = 20e9
# A GPU's share of a node's disks: 25 GB/s for 16 GPUs (Rajbhandari et al. 2021, ZeRO-Infinity, figure 2).
_DISK_BYTES_PER_S = 1.6e9


class StepTimer:
    """Times the steps of one model on one cluster under one engine; what plans share is computed once."""

    def __init__(
        self, model: ModelSpec, *, training: TrainingSpec, cluster: ClusterSpec, execution: Execution
    ) -> None:
        self._model, self._training, self._cluster, self._execution = model, training, cluster, execution
        self._efficiency = cluster.gpu.efficiency
        # Of a layer's collectives, those of the backward pass that products for weight gradients hide.
        beside_weights = execution.overlap_tp_backward and not execution.overlap_tp
        self._hidden_backward = self._efficiency.overlap / 2 if beside_weights else 0.0
        self.compute = Compute(model, training, cluster.gpu, execution)

    def floor_s(self, plan: Plan, stages: tuple[StageShape, ...]) -> float:
        """Return a lower bound of the step for every plan with these degrees, batch and split, sequence parallel alike.

        Arithmetic and the pipeline's filling only: nothing recomputed, nothing communicated.
        """
        busy = [(sum(stage_seconds(self.compute, plan, stage)), stage) for stage in stages]
        return plan.num_microbatches * max(seconds for seconds, _ in busy) + self._bubble(plan, busy)

    def busy_s(self, plan: Plan, stages: tuple[StageShape, ...]) -> tuple[float, StageShape]:
        """Return the seconds of all that happens inside micro-batches, with the bubble, and the stage that sets them.

        Whatever the ZeRO stage, offloading and further recomputation of a plan: its step takes as long at least.
        """
        groups = groups_of(self._cluster, plan)
        busy = [(sum(self._stage_parts(plan, stage, groups).values()), stage) for stage in stages]
        seconds, slowest = max(busy, key=lambda item: item[0])
        return plan.num_microbatches * seconds + self._bubble(plan, busy), slowest

    def step(
        self,
        plan: Plan,
        *,
        state: StateBytes,
        memory: MemoryCost,
        stages: tuple[StageShape, ...],
    ) -> TimeCost:
        """Return the seconds of one step. `memory` is that of the fullest stage."""
        groups = groups_of(self._cluster, plan)
        timed = [(self._stage_parts(plan, stage, groups), stage) for stage in stages]
        parts, stage = max(timed, key=lambda item: sum(item[0].values()))
        count = plan.num_microbatches
        bubble = self._bubble(plan, [(sum(p.values()), s) for p, s in timed])
        forward, backward = stage_seconds(self.compute, plan, stage)
        return TimeCost(
            compute=count * parts["compute"],
            recompute=count * parts["recompute"],
            tp=count * parts["tp"],
            cp=count * parts["cp"],
            ep=count * parts["ep"],
            pp=self._messages_s(plan, groups["pp"]),
            dp=self._data_s(plan, state, stage, groups, forward, backward),
            bubble=bubble,
            optimizer=self.compute.optimizer(state_bytes=memory.weights + memory.gradients + memory.optimizer)
            + self._efficiency.step_ms * 1e-3,
            offload=_offload_s(plan, state, stage),
        )

    def _bubble(self, plan: Plan, busy: list[tuple[float, StageShape]]) -> float:
        """Return how long the slowest stage waits: once through all the others, in 1 / vp of their layers.

        Narayanan et al. 2021, section 2.2: (p - 1) / (v * m) of the working time where all stages are equal.
        """
        if plan.pp == 1:
            return 0.0
        seconds = {stage.kind: value for value, stage in busy}
        total = sum(seconds[kind] for kind in stage_kinds(self._model, plan))
        return (total - max(seconds.values())) / plan.vp

    def _message_bytes(self, plan: Plan) -> float:
        """Hidden states of one micro-batch on one rank."""
        return tokens_of(plan, self._training) * self._model.hidden_size * element_bytes(plan)

    def _stage_parts(self, plan: Plan, stage: StageShape, groups: dict[str, Group]) -> dict[str, float]:
        """Return seconds of one micro-batch on one stage, by part."""
        forward, backward = stage_seconds(self.compute, plan, stage)
        share = _recomputed_share(plan, stage)
        tp = self._tensor_s(plan, stage, groups["tp"])
        ep = self._expert_s(plan, stage, groups["ep"])
        cp = self._context_s(plan, stage, groups["cp"])
        again = 1 + share / 2 if plan.recompute == "full" else 1.0
        sent_again = 1.5 if plan.recompute == "selective" and "moe" in plan.recompute_modules else again
        return {
            "compute": forward + backward,
            "recompute": self._recompute_s(plan, stage, share),
            "tp": tp * (again - self._hidden_backward),
            "cp": cp * again,
            "ep": ep * sent_again,
        }

    def _recompute_s(self, plan: Plan, stage: StageShape, share: float) -> float:
        if plan.recompute == "none":
            return 0.0
        seconds = 0.0
        for count, moe in ((stage.dense_layers, False), (stage.moe_layers, True)):
            if count:
                layer = self.compute.layer(plan, moe=moe)
                if plan.recompute == "full":
                    seconds += share * count * layer.forward
                else:
                    modules = plan.recompute_modules or ("core_attn",)
                    seconds += count * sum(layer.parts.get(name, 0.0) for name in modules)
        return seconds

    def _tensor_s(self, plan: Plan, stage: StageShape, group: Group) -> float:
        """Two all-reduces a layer and pass (Shoeybi et al. 2019, section 3), or what sequence parallel makes of it."""
        if plan.tp == 1:
            return 0.0
        layers = stage.num_layers + stage.has_embedding / 2 + stage.has_head / 2
        if plan.etp < plan.tp:
            layers -= stage.moe_layers / 2  # whole experts sum nothing over the group
        message = self._message_bytes(plan)
        # A reduce-scatter and a gather where the sequence is split between them.
        sum_s = 2 * group.all_gather_s(message) if plan.sequence_parallel else group.all_reduce_s(message)
        sum_s += self._efficiency.skew_us * 1e-6
        return 2 * layers * 2 * sum_s * (1 - self._efficiency.tp_overlap * self._execution.overlap_tp)

    def _context_s(self, plan: Plan, stage: StageShape, group: Group) -> float:
        """Ring attention: keys and values travel round the ring beside the attention of the block at hand.

        Ulysses: queries, keys and values come whole for some heads, and the context goes back, two times with the
        backward pass; nothing is left to hide these exchanges.
        """
        if plan.cp == 1:
            return 0.0
        model = self._model
        if self._execution.heads_over_cp:
            heads = 2 * (model.num_attention_heads + max(plan.cp, model.kv_heads)) * model.head_size
            sent = self._message_bytes(plan) * heads / model.hidden_size / plan.tp
            return 2 * stage.num_layers * group.all_to_all_s(sent, calls=4)
        width = 2 * model.kv_heads * model.head_size / plan.tp / model.hidden_size
        ring = (plan.cp - 1) * group.send_s(self._message_bytes(plan) * width)
        attention = self.compute.layer(plan, moe=stage.dense_layers == 0).parts["core_attn"]
        # The backward pass sends keys, values and their gradients, and has 2.5 times the arithmetic to hide them.
        exposed = max(0.0, ring - self._efficiency.overlap * attention)
        exposed += max(0.0, 2 * ring - self._efficiency.overlap * 2.5 * attention)
        return stage.num_layers * exposed

    def _expert_s(self, plan: Plan, stage: StageShape, group: Group) -> float:
        """Tokens to their experts and back, two all-to-alls a layer and pass."""
        if self._model.moe is None or plan.ep == 1:
            return 0.0
        copies = self._model.moe.top_k
        routed = self._message_bytes(plan) * copies * plan.etp / plan.tp
        sent = group.all_to_all_s(routed, copies=copies if self._execution.deduplicated_dispatch else 1)
        seconds = 2 * stage.moe_layers * 2 * sent * self._execution.expert_imbalance
        return seconds * (1 - self._efficiency.overlap * self._execution.overlap_ep)

    def _messages_s(self, plan: Plan, group: Group) -> float:
        """Every micro-batch crosses each chunk's border forward and backward; the warm-up crosses all stages."""
        if plan.pp == 1:
            return 0.0
        split = plan.tp if plan.sequence_parallel or self._execution.split_messages else 1
        message = self._message_bytes(plan) / split
        steady = (
            2 * plan.vp * plan.num_microbatches * (1 - self._efficiency.overlap * self._execution.overlap_pp)
        )
        return (steady + 2 * (plan.pp - 1)) * group.send_s(message)

    def _data_s(
        self,
        plan: Plan,
        state: StateBytes,
        stage: StageShape,
        groups: dict[str, Group],
        forward: float,
        backward: float,
    ) -> float:
        """Gradients (and with ZeRO weights) between the ranks that hold the same ones, less what computing hides.

        ZeRO paper, section 7: stages 0 to 2 move each gradient and each weight once, stage 3 gathers the weights for
        the forward and the backward pass. From stage 2 on, gradients are sharded, hence reduced after every
        micro-batch (unless the engine keeps them whole). One collective for each layer, about what buckets make.
        """
        frozen = self._execution.frozen_weights
        if frozen and plan.zero_stage < 3:
            return 0.0
        layers = max(1, stage.num_layers)
        # An engine may keep several copies of a gradient, and sends one; loss scaling goes with fp16 on the wire.
        wire = 2.0 if plan.precision == "fp16" else min(4.0, state.gradients)
        shares = ((stage.parameters, groups["state"]), (stage.expert_parameters, groups["expert_state"]))
        moved = [(parameters, group) for parameters, group in shares if parameters and group.size > 1]
        if not moved:
            return 0.0
        reduce = 0.0 if frozen else sum(group.all_gather_s(n * wire, calls=layers) for n, group in moved)
        read = state.gathered or state.weights
        gather = sum(group.all_gather_s(count * read, calls=layers) for count, group in moved)
        if plan.zero_stage >= 2:
            hidden = (forward, backward) if self._execution.overlap_parameters else (0.0, 0.0)
            return self._sharded_s(plan, state, layers, gather, reduce, *hidden)
        if plan.zero_stage == 1:
            gather = self._exposed(gather, forward, layers) if self._execution.overlap_parameters else gather
        else:
            reduce = sum(group.all_reduce_s(count * wire, calls=layers) for count, group in moved)
            gather = 0.0
        beside = self._execution.overlap_gradients and not (
            plan.pp > 1 and self._execution.reduces_after_pipeline
        )
        return (self._exposed(reduce, backward, layers) if beside else reduce) + gather

    def _sharded_s(
        self,
        plan: Plan,
        state: StateBytes,
        layers: int,
        gather: float,
        reduce: float,
        forward: float,
        backward: float,
    ) -> float:
        """Stages 2 and 3: the last micro-batch always reduces, the others unless gradients are kept whole."""
        count = plan.num_microbatches
        # FSDP and ZeRO 3 go by layer, the root (embedding, final norm, head) being one unit more; else a bucket or two.
        units = layers + 1 if plan.zero_stage == 3 or state.regathers else 2
        hooks = units * self._efficiency.sharding_us * 1e-6
        reductions = 1 if state.whole_gradients else count
        forward_s = self._exposed(gather, forward, layers) + hooks
        reduce_s = self._exposed(reduce, backward, layers) + hooks
        if plan.zero_stage == 3:
            both_s = self._exposed(gather + reduce, backward, layers) + 2 * hooks
            alone_s = self._exposed(gather, backward, layers) + hooks
            return count * forward_s + reductions * both_s + (count - reductions) * alone_s
        gathers_s = count * forward_s if state.regathers else gather + hooks
        return reductions * reduce_s + gathers_s

    def _exposed(self, communication: float, computation: float, num_layers: int) -> float:
        """What remains beside computation; the share of one layer always does, as nothing is left to hide it."""
        least = communication / num_layers
        exposed = max(communication - self._efficiency.overlap * computation, least)
        return exposed + self._efficiency.interference * (communication - exposed)


def _recomputed_share(plan: Plan, stage: StageShape) -> float:
    """Share of the layers of a stage whose forward pass is repeated whole."""
    if plan.recompute != "full":
        return 0.0
    if plan.recompute_num_layers == 0:
        return 1.0
    return min(1.0, plan.recompute_num_layers / max(1, stage.num_layers))


def _offload_s(plan: Plan, state: StateBytes, stage: StageShape) -> float:
    """Gradients down, weights up, and Adam at the host's pace; offloaded weights travel for every pass."""
    seconds = 0.0
    owned = owned_parameters(stage, plan) if plan.zero_stage >= 1 else stage.all_parameters
    if plan.offload_optimizer:
        seconds += owned * (state.gradients + state.weights) / _HOST_LINK_BYTES_PER_S
        seconds += 2 * owned * state.optimizer / _HOST_ADAM_BYTES_PER_S
    if plan.offload_parameters:
        seconds += 2 * plan.num_microbatches * owned * state.weights / _HOST_LINK_BYTES_PER_S
    if plan.nvme_path:
        # Each state is read and written once a step, gradients the other way round; weights come for every pass.
        width = 2 * (state.gradients + state.optimizer) * plan.offload_optimizer
        width += (2 * plan.num_microbatches + 1) * state.weights * plan.offload_parameters
        seconds += owned * width / _DISK_BYTES_PER_S
    return seconds
