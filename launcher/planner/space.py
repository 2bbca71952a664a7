"""The legal plans: what divides what, what an engine can do, and what the user pinned. Nothing is costed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.cluster.spec import ClusterSpec
from launcher.errors import PlanError
from strategies.base import Capabilities
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Recompute, TrainingSpec

# Larger micro-batches are tried only when pinned: matrices are full long before.
_MAX_MICRO_BATCH_SIZE = 64
_MAX_VP = 4
# A piece of sequence below this leaves ring attention nothing to hide its messages behind.
_LEAST_TOKENS_PER_CP_RANK = 4096


_KINDS: tuple[Recompute, ...] = ("none", "full")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The `plan` section. None: the planner chooses; a value is pinned and never changed."""

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    vp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    zero_stage: int | None = None
    micro_batch_size: int | None = None
    num_microbatches: int | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool | None = None
    offload_optimizer: bool | None = None
    offload_parameters: bool | None = None

    def __post_init__(self) -> None:
        for key in ("dp", "tp", "pp", "vp", "cp", "ep", "etp", "micro_batch_size", "num_microbatches"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"plan.{key}={value} must be at least 1; null lets the planner choose")
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"plan.zero_stage={self.zero_stage} is not a ZeRO stage; use one of 0, 1, 2, 3")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be planned: the inputs of a ranking."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    request: PlanRequest
    strategies: tuple[str, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Degrees whose product is the world size."""

    dp: int
    tp: int
    pp: int
    vp: int
    cp: int
    ep: int
    etp: int


def check_problem(problem: Problem) -> None:
    """Raise PlanError for what no plan can help: sequence, precision, batch and pins that contradict."""
    model, training, cluster = problem.model, problem.training, problem.cluster
    if training.sequence_length > model.max_position_embeddings:
        raise PlanError(
            f"training.sequence_length={training.sequence_length} exceeds "
            f"model.max_position_embeddings={model.max_position_embeddings}; use that or less"
        )
    # A CPU computes in any precision, if slowly.
    if cluster.gpu.device != "cpu" and training.precision not in cluster.gpu.peak_tflops:
        raise PlanError(
            f"training.precision={training.precision} is not supported by cluster.gpu.name={cluster.gpu.name}; "
            f"use one of {', '.join(sorted(cluster.gpu.peak_tflops))}"
        )
    request = problem.request
    pinned = {key: getattr(request, key) for key in ("dp", "tp", "pp", "cp")}
    if None not in pinned.values():
        _check_product(pinned, cluster.world_size)
    batch = {key: getattr(request, key) for key in ("dp", "micro_batch_size", "num_microbatches")}
    if None not in batch.values():
        _check_batch(batch, training.global_batch_size)


def _check_product(pinned: Mapping[str, int], world_size: int) -> None:
    product = pinned["dp"] * pinned["tp"] * pinned["pp"] * pinned["cp"]
    if product != world_size:
        words = " * ".join(f"plan.{key}={value}" for key, value in pinned.items())
        raise PlanError(
            f"{words} make {product} ranks, but the cluster has {world_size}; "
            "set one of them to null, or change cluster.num_nodes or cluster.gpus_per_node"
        )


def _check_batch(batch: Mapping[str, int], global_batch_size: int) -> None:
    product = batch["dp"] * batch["micro_batch_size"] * batch["num_microbatches"]
    if product != global_batch_size:
        words = " * ".join(f"plan.{key}={value}" for key, value in batch.items())
        raise PlanError(
            f"{words} make {product} sequences a step, not training.global_batch_size={global_batch_size}; "
            f"set one of them to null, or use training.global_batch_size={product}"
        )


def legal_plans(problem: Problem, *, strategy: str, capabilities: Capabilities) -> Iterator[Plan]:
    """Yield every legal plan of one engine, in a fixed order; raise PlanError when a pin allows none."""
    model = problem.model
    if capabilities.model_types is not None and model.model_type not in capabilities.model_types:
        raise PlanError(
            f"strategy={strategy} does not know model.model_type={model.model_type}; "
            f"use one of {', '.join(sorted(capabilities.model_types))}"
        )
    layouts = list(_layouts(problem, strategy, capabilities))
    batched = [(layout, batch) for layout in layouts for batch in _batches(problem, layout)]
    if not batched:
        raise PlanError(_no_batch(problem, layouts))
    legal, refusal = 0, None
    for layout, batch in batched:
        for plan in _switches(problem, strategy, capabilities, layout, batch):
            reason = capabilities.why_not(plan)
            if reason is None:
                legal += 1
                yield plan
            else:
                refusal = refusal or reason
    if not legal:
        raise PlanError(refusal or f"strategy={strategy} has no plan for this model on this cluster")


def _layouts(problem: Problem, strategy: str, capabilities: Capabilities) -> Iterator[_Layout]:
    world = problem.cluster.world_size
    valid = {key: _valid_degrees(problem, key) for key in ("tp", "pp", "cp")}
    options = {}
    for key, values in valid.items():
        options[key] = _options(problem.request, key, values, capabilities, strategy=strategy)
        if getattr(problem.request, key) is None:
            options[key] = [value for value in options[key] if value == 1 or value <= _most(problem, key)]
    found = False
    for tp in options["tp"]:
        for pp in options["pp"]:
            for cp in options["cp"]:
                dp = world // (tp * pp * cp)
                if dp * tp * pp * cp != world or problem.request.dp not in (None, dp):
                    continue
                for layout in _inner_layouts(problem, capabilities, strategy, dp, tp, pp, cp):
                    found = True
                    yield layout
    if not found:
        raise PlanError(_no_layout(problem, options))


def _inner_layouts(
    problem: Problem, capabilities: Capabilities, strategy: str, dp: int, tp: int, pp: int, cp: int
) -> Iterator[_Layout]:
    """Yield the virtual pipeline chunks and expert degrees inside one split of the world."""
    model, request = problem.model, problem.request
    layers = model.num_layers // pp
    chunks = (
        [value for value in divisors(layers) if value <= _MAX_VP or value == request.vp] if pp > 1 else [1]
    )
    experts = model.moe.num_experts if model.moe else 1
    ep_values = [value for value in divisors(experts) if (dp * cp * tp) % value == 0]
    for vp in _options(request, "vp", chunks, capabilities, strategy=strategy):
        for ep in _options(request, "ep", ep_values, capabilities, strategy=strategy):
            etp_values = [value for value in {1, tp} if (dp * cp * tp) % (ep * value) == 0 and model.moe] or [
                1
            ]
            for etp in _options(request, "etp", sorted(etp_values), capabilities, strategy=strategy):
                yield _Layout(dp=dp, tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, etp=etp)


def _valid_degrees(problem: Problem, key: str) -> list[int]:
    """Return values of tp, pp or cp that the model's shape allows, whether or not they divide the world."""
    model = problem.model
    if key == "tp":
        heads, kv_heads = model.num_attention_heads, model.kv_heads
        return [v for v in divisors(heads) if kv_heads % v == 0 or v % kv_heads == 0]
    if key == "pp":
        return divisors(model.num_layers)
    # Ring attention halves each rank's piece once more, to balance the causal mask.
    sequence = problem.training.sequence_length
    return [1] + [value for value in divisors(sequence // 2) if value > 1 and sequence % (2 * value) == 0]


def _most(problem: Problem, key: str) -> int:
    """Return the largest degree worth trying unasked: tensor parallel ranks stay on the fastest links."""
    if key == "tp":
        return problem.cluster.links[0].size or problem.cluster.world_size
    if key == "cp":
        return problem.training.sequence_length // _LEAST_TOKENS_PER_CP_RANK
    return problem.cluster.world_size


_DIVIDED: Mapping[str, Callable[[Problem], str]] = {
    "tp": lambda problem: f"model.num_attention_heads={problem.model.num_attention_heads}",
    "pp": lambda problem: f"model.num_layers={problem.model.num_layers}",
    "cp": lambda problem: f"half of training.sequence_length={problem.training.sequence_length}",
}


def _options(
    request: PlanRequest, key: str, valid: list[int], capabilities: Capabilities, *, strategy: str
) -> list[int]:
    """Return the values of one degree to try: the pinned one, or all valid ones the engine offers."""
    pinned: int | None = getattr(request, key)
    if pinned is not None:
        if pinned > 1 and key not in capabilities.degrees:
            raise PlanError(
                f"strategy={strategy} does not offer plan.{key}={pinned} here; use plan.{key}=1 or null"
            )
        return [pinned] if pinned in valid else []
    return valid if key in capabilities.degrees else [1]


def _no_layout(problem: Problem, options: Mapping[str, list[int]]) -> str:
    """Say which pinned degree cannot be, and which values can."""
    request, world = problem.request, problem.cluster.world_size
    for key in ("tp", "pp", "cp"):
        pinned = getattr(request, key)
        if pinned is not None and not options[key]:
            usable = [value for value in _valid_degrees(problem, key) if world % value == 0]
            return (
                f"plan.{key}={pinned} does not divide {_DIVIDED[key](problem)}; use one of {listed(usable)}"
            )
    pins = {key: getattr(request, key) for key in ("dp", "tp", "pp", "cp") if getattr(request, key)}
    for key, value in pins.items():
        if world % value:
            return (
                f"plan.{key}={value} does not divide the {world} ranks of the cluster; "
                f"use one of {listed(divisors(world))}"
            )
    if request.dp is not None and request.dp != world and all(options[key] == [1] for key in options):
        return f"plan.dp={request.dp} leaves ranks without work: the cluster has {world}; use plan.dp={world}"
    for key, whole in (("ep", "model.moe.num_experts"), ("vp", "the layers of a stage"), ("etp", "plan.tp")):
        if getattr(request, key) not in (None, 1):
            return f"plan.{key}={getattr(request, key)} does not divide {whole}; use another value or null"
    words = ", ".join(f"plan.{key}={value}" for key, value in pins.items())
    return f"{words or 'the plan'} cannot make {world} ranks together; set one to null"


def _batches(problem: Problem, layout: _Layout) -> Iterator[tuple[int, int]]:
    """Yield pairs of micro-batch size and number, smaller micro-batches first."""
    request = problem.request
    if problem.training.global_batch_size % layout.dp:
        return
    per_rank = problem.training.global_batch_size // layout.dp
    for size in divisors(per_rank):
        count = per_rank // size
        # Interleaved schedules need whole rounds of micro-batches (Narayanan et al. 2021, section 2.2.2).
        if layout.vp > 1 and count % layout.pp:
            continue
        free = request.micro_batch_size is None and request.num_microbatches is None
        if free and size > _MAX_MICRO_BATCH_SIZE:
            continue
        if request.micro_batch_size in (None, size) and request.num_microbatches in (None, count):
            yield size, count


def _no_batch(problem: Problem, layouts: list[_Layout]) -> str:
    """Say why no micro-batch fits the global batch, and what would."""
    request, total = problem.request, problem.training.global_batch_size
    ranks = sorted({layout.dp for layout in layouts})
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


def _switches(
    problem: Problem, strategy: str, capabilities: Capabilities, layout: _Layout, batch: tuple[int, int]
) -> Iterator[Plan]:
    """Yield the plans of one layout and batch: ZeRO stages, recomputation, offload."""
    request = problem.request
    stages = [request.zero_stage] if request.zero_stage is not None else sorted(capabilities.zero_stages)
    # Selective recomputation repeats attention to save its scores, which fused attention never stores:
    # it cannot win, so it is tried only when pinned.
    kinds: list[Recompute] = [kind for kind in _KINDS if kind in capabilities.recompute]
    if request.recompute is not None:
        kinds = [request.recompute]
    sequence_parallel = request.sequence_parallel
    if sequence_parallel is None:
        sequence_parallel = layout.tp > 1 and capabilities.sequence_parallel
    for stage in stages:
        for optimizer, parameters in _offloads(problem, capabilities, stage):
            # Over one rank a higher stage saves nothing by itself; it only opens the way to the host.
            if layout.dp * layout.cp == 1 and stage > stages[0] and not (optimizer or parameters):
                continue
            for kind in kinds:
                yield Plan(
                    strategy=strategy,
                    **{key: getattr(layout, key) for key in ("dp", "tp", "pp", "vp", "cp", "ep", "etp")},
                    zero_stage=stage,
                    micro_batch_size=batch[0],
                    num_microbatches=batch[1],
                    recompute=kind,
                    sequence_parallel=sequence_parallel,
                    offload_optimizer=optimizer,
                    offload_parameters=parameters,
                    precision=problem.training.precision,
                    rank_order=capabilities.rank_order,
                    engine=problem.engine,
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


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    low = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return low + [number // value for value in reversed(low) if value * value != number]


def listed(values: list[int], *, most: int = 12) -> str:
    """Write values as text, the first `most` of them."""
    return ", ".join(str(value) for value in values[:most]) + (", ..." if len(values) > most else "")
