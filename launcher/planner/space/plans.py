"""The legal plans: what divides what, what an engine can do, and what the user pinned. Nothing is costed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from launcher.errors import PlanError
from launcher.planner.problem import PlanRequest, Problem, check_problem, divisors, listed
from launcher.planner.space.layouts import Layout, World, layouts_of, no_layout, worlds
from strategies.base import Capabilities
from strategies.spec import Plan, Recompute, even_split

__all__ = [
    "Batch",
    "PlanRequest",
    "Problem",
    "Space",
    "Switches",
    "check_problem",
    "divisors",
    "legal_plans",
    "listed",
]

# Larger micro-batches are tried only when pinned: matrices are full long before.
_MAX_MICRO_BATCH_SIZE = 64
_MAX_MICRO_BATCH_TOKENS = 2**17
# Modules whose recomputation costs little beside the memory it frees (DeepSeek-V3, section 3.2.3).
_LIGHT_MODULES = ("layernorm", "mla_up_proj", "moe_act")
_PARTS = (1, 2, 3, 4, 5, 6, 7)  # eighths of the layers of a stage


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one forward pass, and how many of them make a step."""

    size: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What else a plan says. Of it only sequence parallel changes a forward and backward pass: it splits the norms."""

    zero_stage: int
    recompute: Recompute
    recompute_num_layers: int
    recompute_modules: tuple[str, ...]
    sequence_parallel: bool
    offload_optimizer: bool
    offload_parameters: bool
    rank_order: tuple[str, ...]

    @property
    def on_host(self) -> tuple[bool, bool]:
        """Whether the optimizer's states, and the weights, are offloaded."""
        return self.offload_optimizer, self.offload_parameters

    @property
    def placement(self) -> tuple[object, ...]:
        """What the communication inside a micro-batch depends on."""
        return self.rank_order, self.sequence_parallel

    @cached_property
    def memory_key(self) -> tuple[object, ...]:
        """What memory depends on: all but the placement of the ranks."""
        recompute = (self.recompute, self.recompute_num_layers, self.recompute_modules)
        return (self.zero_stage, recompute, self.sequence_parallel, self.on_host)


class Space:
    """The legal plans of one engine, by layout, batch and switches."""

    def __init__(self, problem: Problem, *, strategy: str, capabilities: Capabilities) -> None:
        self.problem, self.strategy, self.capabilities = problem, strategy, capabilities
        self._switches: dict[tuple[object, ...], tuple[Switches, ...]] = {}
        self._refusal: str | None = None
        model = problem.model
        if capabilities.model_types is not None and model.model_type not in capabilities.model_types:
            raise PlanError(
                f"strategy={strategy} does not know model.model_type={model.model_type}; "
                f"use one of {', '.join(sorted(capabilities.model_types))}"
            )
        self.members = tuple(self._members())
        if not any(self.switches(layout) for layout, _ in self.members):
            raise PlanError(
                self._refusal or f"strategy={strategy} has no plan for this model on this cluster"
            )

    def switches(self, layout: Layout) -> tuple[Switches, ...]:
        """Return what a layout can be combined with, refusals of the engine left out."""
        # Rules may look at which degrees exceed 1, and at no other number: see Capabilities.rules.
        degrees = (layout.dp, layout.tp, layout.pp, layout.vp, layout.cp, layout.ep, layout.etp)
        partial = self._partial(layout)
        orders = self._rank_orders(layout)
        key = (*(degree > 1 for degree in degrees), bool(layout.split), partial, orders)
        found = self._switches.get(key)
        if found is None:
            found = self._switches[key] = tuple(self._legal_switches(layout, partial, orders))
        return found

    def plan(self, layout: Layout, batch: Batch, switches: Switches) -> Plan:
        """Put the parts of a plan together."""
        return Plan(
            strategy=self.strategy,
            dp=layout.dp,
            tp=layout.tp,
            pp=layout.pp,
            vp=layout.vp,
            cp=layout.cp,
            ep=layout.ep,
            etp=layout.etp,
            zero_stage=switches.zero_stage,
            micro_batch_size=batch.size,
            num_microbatches=batch.count,
            recompute=switches.recompute,
            recompute_num_layers=switches.recompute_num_layers,
            recompute_modules=switches.recompute_modules,
            pipeline_split=layout.split,
            sequence_parallel=switches.sequence_parallel,
            offload_optimizer=switches.offload_optimizer,
            offload_parameters=switches.offload_parameters,
            nvme_path=self.problem.request.nvme_path,
            precision=self.problem.training.precision,
            rank_order=switches.rank_order,
            engine=self.problem.engine,
        )

    def _members(self) -> Iterator[tuple[Layout, tuple[Batch, ...]]]:
        """Yield every layout with its batches, smaller micro-batches first."""
        problem, capabilities = self.problem, self.capabilities
        found = False
        splits = worlds(problem, strategy=self.strategy, capabilities=capabilities)
        for world in splits:
            batches = tuple(_batches(problem, world.dp))
            if not batches:
                continue
            for layout in layouts_of(problem, world, strategy=self.strategy, capabilities=capabilities):
                # Interleaved schedules need whole rounds of micro-batches (Narayanan et al. 2021, section 2.2.2).
                rounds = tuple(b for b in batches if layout.vp == 1 or b.count % layout.pp == 0)
                if capabilities.fills_pipeline:
                    rounds = tuple(b for b in rounds if b.count >= layout.pp)
                if rounds:
                    found = True
                    yield layout, rounds
        if not found:
            raise PlanError(self._nothing(splits))

    def _nothing(self, splits: list[World]) -> str:
        """Say whether it is the layout or the batch that cannot be."""
        for world in splits:
            for _ in layouts_of(self.problem, world, strategy=self.strategy, capabilities=self.capabilities):
                return _no_batch(self.problem, splits)
        return no_layout(self.problem, self.capabilities, self.strategy)

    def _rank_orders(self, layout: Layout) -> tuple[tuple[str, ...], ...]:
        """Return the placements to try: others than the engine's first only where stages would share fast links."""
        pinned, own = self.problem.request.rank_order, self.capabilities.rank_order
        if pinned is not None:
            return (pinned,)
        neighbours = self.problem.cluster.reach_of(self.problem.cluster.links[0]) or 0
        inside = layout.tp * layout.cp < neighbours < self.problem.cluster.world_size
        if layout.pp > 1 and layout.dp > 1 and inside:
            return (own, *self.capabilities.other_rank_orders)
        return (own,)

    def _partial(self, layout: Layout) -> tuple[int, ...]:
        """Return for how many layers of a stage recomputation is tried, beside all and none of them."""
        request = self.problem.request
        if request.recompute_num_layers is not None:
            return (request.recompute_num_layers,) if request.recompute_num_layers else ()
        if not self.capabilities.partial_recompute:
            return ()
        chunks = layout.split or even_split(self.problem.model.num_layers, layout.pp * layout.vp)
        most = max(sum(chunks[stage :: layout.pp]) for stage in range(layout.pp))
        # Every chunk of a stage recomputes equally many.
        steps = {round(most * part / 8 / layout.vp) * layout.vp for part in _PARTS}
        return tuple(sorted(step for step in steps if 0 < step < most))

    def _recomputes(self, partial: tuple[int, ...]) -> Iterator[tuple[Recompute, int, tuple[str, ...]]]:
        """Yield what to recompute: the kind, of how many layers, which modules."""
        request, capabilities, model = self.problem.request, self.capabilities, self.problem.model
        kinds = _kinds(request, capabilities)
        if "none" in kinds:
            yield "none", 0, ()
        if "selective" in kinds:
            if request.recompute_modules is not None:
                yield "selective", 0, request.recompute_modules
            else:
                # Recomputing attention saves its scores, which fused attention never stores: it cannot win.
                if request.recompute == "selective" or "flash" not in capabilities.execution.attention:
                    yield "selective", 0, ()
                light = tuple(name for name in _LIGHT_MODULES if name in capabilities.recompute_modules)
                if light and (model.moe or model.mla):
                    yield "selective", 0, tuple(n for n in light if n != "mla_up_proj" or model.mla)
        if "full" in kinds:
            for layers in partial:
                yield "full", layers, ()
            if not request.recompute_num_layers:
                yield "full", 0, ()

    def _legal_switches(
        self, layout: Layout, partial: tuple[int, ...], orders: tuple[tuple[str, ...], ...]
    ) -> Iterator[Switches]:
        """Yield ZeRO stages, recomputation, offload and placement that the engine does not refuse."""
        for stage, on_host in self._stages(layout):
            for recompute in self._recomputes(partial):
                for sequence, order in product(self._sequence_parallel(layout), orders):
                    switches = Switches(
                        zero_stage=stage,
                        recompute=recompute[0],
                        recompute_num_layers=recompute[1],
                        recompute_modules=recompute[2],
                        sequence_parallel=sequence,
                        offload_optimizer=on_host[0],
                        offload_parameters=on_host[1],
                        rank_order=order,
                    )
                    plan = self.plan(layout, Batch(size=1, count=1), switches)
                    reason = self.capabilities.why_not(plan, self.problem.model)
                    if reason is None:
                        yield switches
                    self._refusal = self._refusal or reason

    def _stages(self, layout: Layout) -> Iterator[tuple[int, tuple[bool, bool]]]:
        """Yield ZeRO stages, each with what is offloaded."""
        pinned = self.problem.request.zero_stage
        stages = [pinned] if pinned is not None else sorted(self.capabilities.zero_stages)
        for stage in stages:
            for on_host in _offloads(self.problem, self.capabilities, stage):
                # Over one rank a higher stage saves nothing by itself; it only opens the way to the host.
                if layout.dp * layout.cp > 1 or stage == stages[0] or any(on_host):
                    yield stage, on_host

    def _sequence_parallel(self, layout: Layout) -> list[bool]:
        """Return both where there is a choice: whole all-reduces may be summed in the switch, gathers may not."""
        pinned = self.problem.request.sequence_parallel
        if pinned is not None:
            return [pinned]
        return [True, False] if layout.tp > 1 and self.capabilities.sequence_parallel else [False]


def legal_plans(problem: Problem, *, strategy: str, capabilities: Capabilities) -> Iterator[Plan]:
    """Yield every legal plan of one engine, in a fixed order; raise PlanError when a pin allows none."""
    space = Space(problem, strategy=strategy, capabilities=capabilities)
    for layout, batches in space.members:
        for batch in batches:
            for switches in space.switches(layout):
                yield space.plan(layout, batch, switches)


def _kinds(request: PlanRequest, capabilities: Capabilities) -> frozenset[str]:
    """Return the kinds of recomputation to try."""
    pinned: Any = request.recompute
    if pinned is None and request.recompute_num_layers is not None:
        pinned = "full"
    if pinned is None and request.recompute_modules is not None:
        pinned = "selective"
    return capabilities.recompute if pinned is None else frozenset({pinned})


def _batches(problem: Problem, dp: int) -> Iterator[Batch]:
    """Yield micro-batch sizes and numbers, smaller micro-batches first."""
    request = problem.request
    if problem.training.global_batch_size % dp:
        return
    per_rank = problem.training.global_batch_size // dp
    free = request.micro_batch_size is None and request.num_microbatches is None
    for size in divisors(per_rank):
        count = per_rank // size
        if free and not _worth_trying(problem, size, per_rank):
            continue
        if request.micro_batch_size in (None, size) and request.num_microbatches in (None, count):
            yield Batch(size=size, count=count)


def _worth_trying(problem: Problem, size: int, per_rank: int) -> bool:
    """Powers of two, and from the largest of them on the other divisors, as long as the device is not full."""
    tokens = size * problem.training.sequence_length
    if size > 1 and (size > _MAX_MICRO_BATCH_SIZE or tokens > _MAX_MICRO_BATCH_TOKENS):
        return False
    even = per_rank & -per_rank
    return size & (size - 1) == 0 or size % even == 0


def _no_batch(problem: Problem, splits: list[World]) -> str:
    """Say why no micro-batch fits the global batch, and what would."""
    request, total = problem.request, problem.training.global_batch_size
    ranks = sorted({world.dp for world in splits})
    per_rank = [total // dp for dp in ranks if total % dp == 0]
    if not per_rank:
        dp = ranks[0]
        near = [value for value in (total // dp * dp, (total // dp + 1) * dp) if value]
        return (
            f"training.global_batch_size={total} is not a multiple of plan.dp={dp}; "
            f"use one of {listed(near)}, or another number of ranks"
        )
    usable = sorted({size for count in per_rank for size in divisors(count)})
    for key in ("micro_batch_size", "num_microbatches"):
        value = getattr(request, key)
        if value is not None and value not in usable:
            dp = ranks[0]
            return (
                f"plan.{key}={value} * plan.dp={dp} does not divide training.global_batch_size={total}; "
                f"use one of {listed(usable)}"
            )
    return (
        f"plan.micro_batch_size={request.micro_batch_size}, plan.num_microbatches={request.num_microbatches} and "
        f"plan.vp={request.vp} do not make training.global_batch_size={total}; set one to null"
    )


def _offloads(problem: Problem, capabilities: Capabilities, stage: int) -> Iterator[tuple[bool, bool]]:
    """Yield pairs (optimizer, parameters). On a CPU, host and device memory are the same: nothing to gain."""
    request = problem.request
    may = problem.cluster.gpu.device != "cpu"
    optimizer = [False] + [True] * (may and stage in capabilities.offload_optimizer_stages)
    parameters = [False] + [True] * (may and stage in capabilities.offload_parameters_stages)
    for first in optimizer if request.offload_optimizer is None else [request.offload_optimizer]:
        for second in parameters if request.offload_parameters is None else [request.offload_parameters]:
            # Weights follow the optimizer to the host: alone they would save the smaller part only.
            if second and not first and request.offload_parameters is None:
                continue
            yield first, second
