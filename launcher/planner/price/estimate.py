"""Estimator: bytes and seconds of the plans of one problem under one engine, and bounds that cost next to nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.cluster.spec import ClusterSpec
from launcher.planner.cost import GIB, CostBreakdown, MemoryCost, parts
from launcher.planner.price.compute import peak_flops
from launcher.planner.price.memory import MemoryModel
from launcher.planner.price.stages import StageShape, stages_of
from launcher.planner.price.step_time import StepTimer
from launcher.planner.problem import Problem
from strategies.base import Capabilities
from strategies.model_spec import ModelSpec
from strategies.spec import Plan


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the fullest rank, and of what it keeps on the host."""

    memory: MemoryCost
    host_bytes: float
    disk_bytes: float
    stage: int  # the pipeline stage it stands in


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Seconds that plans which differ in switches only cannot undercut.

    Recomputing all layers of the stage that sets `busy_s` adds `recompute_s`: if another stage becomes the slowest one,
    it takes longer than this one.
    """

    busy_s: float
    recompute_s: float
    layers: int  # of that stage


class _Models:
    """The models of memory and time over one vocabulary, which an engine may have padded."""

    def __init__(self, problem: Problem, capabilities: Capabilities, model: ModelSpec) -> None:
        training = problem.training
        self.model = model
        self.memory = MemoryModel(model, training, capabilities)
        self.timer = StepTimer(
            model, training=training, cluster=problem.cluster, execution=capabilities.execution
        )


class Estimator:
    """Costs plans; what several of them share is computed once."""

    def __init__(self, problem: Problem, capabilities: Capabilities) -> None:
        self._problem, self._capabilities = problem, capabilities
        self._usable = usable_bytes(problem.cluster)
        self._by_tp: dict[int, _Models] = {}
        self._stages: dict[tuple[object, ...], tuple[StageShape, ...]] = {}
        self._states: dict[tuple[object, ...], float] = {}
        model, training, gpu = problem.model, problem.training, problem.cluster.gpu
        self._flops = model.flops_per_token(training.sequence_length) * training.tokens_per_step
        self._peak = None if gpu.peak_is_nominal else peak_flops(gpu, training.precision)

    def predict(self, plan: Plan) -> CostBreakdown:
        """Return the predicted cost of one legal plan."""
        return self.cost(plan, self.footprint(plan))

    def footprint(self, plan: Plan) -> Footprint:
        """Return the bytes of the fullest rank."""
        memory_model = self._models(plan).memory
        found: tuple[MemoryCost, float] | None = None
        index, most, on_disk = 0, -1.0, 0.0
        for stage in self.stages(plan):
            cost = memory_model.of(plan, stage)
            total = cost[0].total
            if total > most:
                found, index, most = cost, stage.index, total
                on_disk = memory_model.disk_bytes(plan, stage)
        assert found is not None, "a plan has at least one stage"
        return Footprint(memory=found[0], host_bytes=found[1], disk_bytes=on_disk, stage=index)

    def cost(self, plan: Plan, footprint: Footprint) -> CostBreakdown:
        """Return the cost of a plan whose footprint is known."""
        time = self._models(plan).timer.step(
            plan,
            state=self._capabilities.state_bytes_of(plan),
            memory=footprint.memory,
            stages=self.stages(plan),
        )
        return CostBreakdown(
            memory=footprint.memory,
            host_bytes=footprint.host_bytes,
            disk_bytes=footprint.disk_bytes,
            stage=footprint.stage,
            time=time,
            tokens_per_step=self._problem.training.tokens_per_step,
            num_gpus=plan.world_size,
            model_flops_per_step=self._flops,
            peak_flops=self._peak,
        )

    def state_bytes(self, plan: Plan) -> float:
        """Return weights, gradients and optimizer states of the fullest rank: no micro-batch needs less than them."""
        key = (
            plan.dp,
            plan.tp,
            plan.pp,
            plan.vp,
            plan.cp,
            plan.ep,
            plan.etp,
            plan.pipeline_split,
            plan.zero_stage,
            plan.offload_optimizer,
            plan.offload_parameters,
        )
        found = self._states.get(key)
        if found is None:
            memory_model = self._models(plan).memory
            found = 0.0
            for stage in self.stages(plan):
                cost = memory_model.of(plan, stage)[0]
                found = max(found, cost.weights + cost.gradients + cost.optimizer)
            self._states[key] = found
        return found

    def floor_s(self, plan: Plan) -> float:
        """Return seconds that no plan with these degrees, batch and split can undercut: its arithmetic alone."""
        return self._models(plan).timer.floor_s(plan, self.stages(plan))

    def bounds(self, plan: Plan) -> Bounds:
        """Return tighter ones for a plan that recomputes nothing: all that happens inside its micro-batches."""
        timer = self._models(plan).timer
        busy, slowest = timer.busy_s(plan, self.stages(plan))
        forward = 0.0
        for count, moe in ((slowest.dense_layers, False), (slowest.moe_layers, True)):
            if count:
                forward += count * timer.compute.layer(plan, moe=moe).forward
        return Bounds(busy_s=busy, recompute_s=plan.num_microbatches * forward, layers=slowest.num_layers)

    def too_large(self, footprint: Footprint) -> str | None:
        """Return one sentence why a plan does not fit, or None."""
        cluster, memory = self._problem.cluster, footprint.memory
        total = memory.total
        if total > self._usable:
            return (
                f"needs {total / GIB:.1f} GiB per GPU ({_numbers(memory)}) of the "
                f"{self._usable / GIB:.1f} GiB usable on {cluster.gpu.name}"
            )
        on_host = footprint.host_bytes * min(cluster.gpus_per_node, cluster.world_size)
        if on_host > cluster.host_memory_gib * GIB:
            return (
                f"offloads {on_host / GIB:.1f} GiB per node of the "
                f"cluster.host_memory_gib={cluster.host_memory_gib}"
            )
        return None

    def stages(self, plan: Plan) -> tuple[StageShape, ...]:
        """Return one stage of each kind."""
        key = (plan.pp, plan.vp, plan.pipeline_split, plan.tp, plan.ep, plan.etp)
        found = self._stages.get(key)
        if found is None:
            found = self._stages[key] = stages_of(self._models(plan).model, plan)
        return found

    def _models(self, plan: Plan) -> _Models:
        found = self._by_tp.get(plan.tp)
        if found is None:
            model = self._problem.model
            rows = model.padded_vocab_size(self._capabilities.vocabulary_multiple * plan.tp)
            padded = model if rows == model.vocab_size else replace(model, vocab_size=rows)
            found = self._by_tp[plan.tp] = _Models(self._problem, self._capabilities, padded)
        return found


def usable_bytes(cluster: ClusterSpec) -> float:
    """Bytes that a plan may fill on one GPU."""
    return (cluster.gpu.memory_gib - cluster.reserved_gib) * GIB


def process_bytes(cluster: ClusterSpec) -> float:
    """Bytes beside a plan's own in what is measured: on a CPU that is the whole process, libraries included."""
    return cluster.reserved_gib * GIB if cluster.gpu.device == "cpu" else 0.0


def _numbers(memory: MemoryCost) -> str:
    return ", ".join(
        f"{name} {value / GIB:.1f}" for name, value in parts(memory).items() if value >= GIB / 20
    )
