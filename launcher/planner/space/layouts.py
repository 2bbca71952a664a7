"""How a world of ranks can be split: its degrees, chunks, experts, and layers by stage. Nothing is costed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.errors import PlanError
from launcher.planner.problem import Problem, divisors, listed, text_of
from strategies.base import Capabilities
from strategies.model_spec import ModelSpec
from strategies.spec import even_split

# Unasked, stages are cut into no more chunks: each one adds messages for ever less bubble.
_MAX_VP = 12
# A piece of sequence below this leaves ring attention nothing to hide its messages behind.
_LEAST_TOKENS_PER_CP_RANK = 4096


@dataclass(frozen=True, kw_only=True)
class World:
    """Degrees whose product is the world size."""

    dp: int
    tp: int
    pp: int
    cp: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A world, what happens inside it, and the layers of each chunk (empty: the same everywhere)."""

    dp: int
    tp: int
    pp: int
    vp: int
    cp: int
    ep: int
    etp: int
    split: tuple[int, ...]


def worlds(problem: Problem, *, strategy: str, capabilities: Capabilities) -> list[World]:
    """Return every split of the ranks that pins, model and engine allow; raise PlanError when a pin allows none."""
    found = list(_worlds(problem, _world_options(problem, strategy, capabilities)))
    if not found:
        raise PlanError(no_layout(problem, capabilities, strategy))
    return found


def layouts_of(
    problem: Problem, world: World, *, strategy: str, capabilities: Capabilities
) -> Iterator[Layout]:
    """Yield the chunks, expert degrees and layer splits inside one split of the ranks."""
    model = problem.model
    inside = world.dp * world.cp * world.tp
    experts = [value for value in divisors(model.moe.num_experts if model.moe else 1) if inside % value == 0]
    pairs = [
        (ep, etp)
        for ep in _options(problem, "ep", experts, capabilities, strategy)
        for etp in _options(
            problem, "etp", _expert_splits(model, world, inside // ep), capabilities, strategy
        )
    ]
    for vp in _options(problem, "vp", _chunks(problem, world.pp, capabilities), capabilities, strategy):
        for split in _splits(problem, capabilities, world.pp, vp):
            for ep, etp in pairs:
                yield Layout(
                    dp=world.dp, tp=world.tp, pp=world.pp, vp=vp, cp=world.cp, ep=ep, etp=etp, split=split
                )


def _worlds(problem: Problem, options: Mapping[str, list[int]]) -> Iterator[World]:
    size = problem.cluster.world_size
    for tp in options["tp"]:
        for pp in options["pp"]:
            for cp in options["cp"]:
                dp = size // (tp * pp * cp)
                if dp * tp * pp * cp == size and problem.request.dp in (None, dp):
                    yield World(dp=dp, tp=tp, pp=pp, cp=cp)


def _world_options(problem: Problem, strategy: str, capabilities: Capabilities) -> dict[str, list[int]]:
    options = {}
    for key in ("tp", "pp", "cp"):
        found = _options(problem, key, _valid_degrees(problem, key, capabilities), capabilities, strategy)
        if getattr(problem.request, key) is None:
            found = [value for value in found if value == 1 or _worth_trying(problem, key, value)]
        options[key] = found
    return options


def _options(
    problem: Problem, key: str, valid: list[int], capabilities: Capabilities, strategy: str
) -> list[int]:
    """Return the values of one degree to try: the pinned one, or all valid ones the engine offers."""
    pinned: int | None = getattr(problem.request, key)
    if pinned is not None:
        if pinned > 1 and key not in capabilities.degrees:
            raise PlanError(
                f"strategy={strategy} does not offer plan.{key}={pinned} here; use plan.{key}=1 or null"
            )
        return [pinned] if pinned in valid else []
    return valid if key in capabilities.degrees else [1]


def _valid_degrees(problem: Problem, key: str, capabilities: Capabilities) -> list[int]:
    """Return values of tp, pp or cp that the model's shape allows, whether or not they divide the world."""
    model = problem.model
    if key == "tp":
        return [
            value
            for value in divisors(model.num_attention_heads)
            if _undivided(model, capabilities, value) is None
        ]
    if key == "pp":
        return (
            list(range(1, model.num_layers + 1))
            if capabilities.uneven_pipeline
            else divisors(model.num_layers)
        )
    sequence = problem.training.sequence_length
    if capabilities.execution.heads_over_cp:
        return [
            value for value in divisors(model.num_attention_heads) if _swaps_heads(model, sequence, value)
        ]
    # Ring attention halves each rank's piece once more, to balance the causal mask.
    return [1] + [value for value in divisors(sequence // 2) if value > 1 and sequence % (2 * value) == 0]


def _swaps_heads(model: ModelSpec, sequence_length: int, cp: int) -> bool:
    """Say whether Ulysses can deal out heads and sequence; fewer key/value heads than ranks are copied."""
    return sequence_length % cp == 0 and not (model.kv_heads % cp and cp % model.kv_heads)


def _undivided(model: ModelSpec, capabilities: Capabilities, tp: int) -> str | None:
    """Name what `tp` does not divide, or None. Fewer key/value heads than ranks are copied, where the engine does."""
    if model.num_attention_heads % tp or (model.kv_heads % tp and tp % model.kv_heads):
        return f"model.num_attention_heads={model.num_attention_heads}"
    if model.kv_heads % tp and not capabilities.copies_kv_heads:
        return f"model.num_kv_heads={model.kv_heads}"
    if model.ffn_hidden_size % tp:
        return f"model.ffn_hidden_size={model.ffn_hidden_size}"
    if not capabilities.vocabulary_multiple and model.vocab_size % tp:
        return f"model.vocab_size={model.vocab_size}"
    return None


def _worth_trying(problem: Problem, key: str, value: int) -> bool:
    """Say whether a degree is tried unasked: tensor parallel ranks stay on the fastest links, for example."""
    if key == "tp":
        return value <= (problem.cluster.reach_of(problem.cluster.links[0]) or problem.cluster.world_size)
    if key == "cp":
        return value <= problem.training.sequence_length // _LEAST_TOKENS_PER_CP_RANK
    split = problem.request.pipeline_split
    if split:
        return len(split) % value == 0
    return value & (value - 1) == 0 or problem.model.num_layers % value == 0


def _expert_splits(model: ModelSpec, world: World, ranks: int) -> list[int]:
    """Return tensor parallel degrees inside an expert: none, or that of everything else."""
    if model.moe is None:
        return [1]
    width = model.moe.expert_ffn_hidden_size
    return sorted({value for value in (1, world.tp) if ranks % value == 0 and width % value == 0})


def _chunks(problem: Problem, pp: int, capabilities: Capabilities) -> list[int]:
    """Return how many chunks a stage may be cut into."""
    layers, request = problem.model.num_layers, problem.request
    if pp == 1:
        return [1]
    if request.pipeline_split:
        return [len(request.pipeline_split) // pp] if len(request.pipeline_split) % pp == 0 else []
    most = layers // pp if request.vp is not None else min(_MAX_VP, layers // pp)
    if layers % pp == 0:
        valid = [value for value in divisors(layers // pp) if value <= most]
    else:
        valid = [value for value in range(1, most + 1) if value & (value - 1) == 0]
    if capabilities.uneven_pipeline:
        # Chunks of one layer, the first or last without any: they hold the embedding and the head.
        single = -(-layers // pp)
        if request.vp is not None:
            valid = list(range(1, most + 1))
        if layers % pp and pp * single - layers <= 2 and single <= _MAX_VP:
            valid.append(single)
    return valid


def _splits(problem: Problem, capabilities: Capabilities, pp: int, vp: int) -> list[tuple[int, ...]]:
    """Return layers by chunk to try: the same everywhere, and what makes up for the output head."""
    layers, pinned = problem.model.num_layers, problem.request.pipeline_split
    if pinned:
        return [pinned] if len(pinned) == pp * vp else []
    if pp == 1:
        return [()]
    if not capabilities.uneven_pipeline:
        return [()] if layers % (pp * vp) == 0 else []
    if pp * vp > layers:
        return [] if pinned is not None else [_bordered(layers, pp * vp)]
    balanced = _balanced(problem, pp, vp) if pinned is None else ()
    return [(), balanced] if balanced else [()]


def _bordered(layers: int, chunks: int) -> tuple[int, ...]:
    """Return single layers, with the last chunk empty, and the first one too where two layers lack."""
    first = (0,) if chunks - layers == 2 else ()
    return (*first, *(1,) * layers, 0)


def _balanced(problem: Problem, pp: int, vp: int) -> tuple[int, ...]:
    """Return a split whose last chunk is smaller by what the head weighs, or nothing where that is no gain."""
    layers, chunks = problem.model.num_layers, pp * vp
    head = _head_in_layers(problem.model, problem.training.sequence_length)
    last = max(1, round((layers + head) / chunks - head))
    if layers - last < chunks - 1:
        return ()
    split = (*even_split(layers - last, chunks - 1), last)
    heaviest = [_heaviest(candidate, pp, head) for candidate in (even_split(layers, chunks), split)]
    return split if heaviest[1] < heaviest[0] - 1e-9 else ()


def _heaviest(split: tuple[int, ...], pp: int, head: float) -> float:
    """Return the most layers of any stage, the head counted in layers."""
    totals = [float(sum(split[stage::pp])) for stage in range(pp)]
    totals[-1] += head
    return max(totals)


def _head_in_layers(model: ModelSpec, sequence_length: int) -> float:
    """Return the arithmetic of the output head, in layers of the kind that there are most of."""
    active = model.moe_layer_parameters(model.moe.top_k) if model.num_moe_layers and model.moe else 0
    per_layer = 2 * (active or model.dense_layer_parameters) + model.attention_flops_per_token(
        sequence_length
    )
    return 2 * model.vocab_size * model.hidden_size / per_layer


# ---- what cannot be, in one sentence ------------------------------------------------------------------------------


def no_layout(problem: Problem, capabilities: Capabilities, strategy: str) -> str:
    """Say which pinned degree cannot be, and which values can."""
    request, size = problem.request, problem.cluster.world_size
    options = _world_options(problem, strategy, capabilities)
    for key in ("tp", "pp", "cp"):
        pinned = getattr(request, key)
        if pinned is not None and not options[key]:
            usable = [value for value in _valid_degrees(problem, key, capabilities) if size % value == 0]
            return f"plan.{key}={pinned} {_misfit(problem, key, capabilities)}; use one of {listed(usable)}"
    pins = {key: getattr(request, key) for key in ("dp", "tp", "pp", "cp") if getattr(request, key)}
    for key, value in pins.items():
        if size % value:
            return (
                f"plan.{key}={value} does not divide the {size} ranks of the cluster; "
                f"use one of {listed(divisors(size))}"
            )
    if request.dp is not None and request.dp != size and all(options[key] == [1] for key in options):
        return f"plan.dp={request.dp} leaves ranks without work: the cluster has {size}; use plan.dp={size}"
    return _no_inside(problem) or (
        f"{', '.join(f'plan.{key}={value}' for key, value in pins.items()) or 'the plan'} cannot make "
        f"{size} ranks together; set one to null"
    )


def _no_inside(problem: Problem) -> str | None:
    """Name the pin inside the world that nothing allows."""
    request = problem.request
    for key, whole in (("ep", "model.moe.num_experts"), ("vp", "the layers of a stage"), ("etp", "plan.tp")):
        if getattr(request, key) not in (None, 1):
            return f"plan.{key}={getattr(request, key)} does not divide {whole}; use another value or null"
    if request.pipeline_split:
        return (
            f"plan.pipeline_split={text_of(request.pipeline_split)} does not match the stages that "
            f"{problem.cluster.world_size} ranks can have; name the layers of plan.pp * plan.vp chunks"
        )
    return None


def _misfit(problem: Problem, key: str, capabilities: Capabilities) -> str:
    """Say what a pinned degree does not divide."""
    model, value = problem.model, getattr(problem.request, key)
    if key == "tp":
        return f"does not divide {_undivided(model, capabilities, value)}"
    if key == "cp" and capabilities.execution.heads_over_cp:
        return f"cannot share out model.num_attention_heads={model.num_attention_heads} and the sequence"
    if key == "cp":
        return f"does not divide half of training.sequence_length={problem.training.sequence_length}"
    if capabilities.uneven_pipeline:
        return f"exceeds model.num_layers={model.num_layers}"
    return f"does not divide model.num_layers={model.num_layers}"
