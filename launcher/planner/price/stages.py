"""Pipeline stages by what they hold: layers by kind, embedding, head, and the parameters of one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from strategies.model_spec import ModelSpec
from strategies.spec import Plan

# (dense layers, mixture layers, embedding, head)
StageKind = tuple[int, int, bool, bool]


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """What one pipeline stage holds: its layers, and the parameters of one of its ranks."""

    index: int
    dense_layers: int
    moe_layers: int
    has_embedding: bool
    has_head: bool
    parameters: float  # sharded by ZeRO over dp * cp ranks
    expert_parameters: float  # sharded over the ranks that hold the same experts
    layer_parameters: float  # of one of its largest layers: what ZeRO 3 gathers at a time
    root_parameters: float  # embedding, final norm and head: gathered as one unit
    expert_pieces: int = 0  # parts that a layer's experts can be sharded into at most; 0: any number

    @property
    def num_layers(self) -> int:
        """Layers of this stage."""
        return self.dense_layers + self.moe_layers

    @property
    def all_parameters(self) -> float:
        """Of one rank, nothing sharded over data parallel ranks."""
        return self.parameters + self.expert_parameters

    @property
    def kind(self) -> StageKind:
        """What stages that cost the same have in common."""
        return self.dense_layers, self.moe_layers, self.has_embedding, self.has_head


def stages_of(model: ModelSpec, plan: Plan) -> tuple[StageShape, ...]:
    """Return one stage of each kind, the earliest: among these are the fullest and the slowest one.

    Stages of a kind hold the same layers; under 1F1B the earliest of them keeps the most micro-batches.
    """
    kinds: dict[StageKind, int] = {}
    for index, kind in enumerate(stage_kinds(model, plan)):
        kinds.setdefault(kind, index)
    return tuple(
        _stage(model, plan, index, dense_layers=dense, moe_layers=moe)
        for (dense, moe, _, _), index in kinds.items()
    )


def stage_kinds(model: ModelSpec, plan: Plan) -> list[StageKind]:
    """Return the kind of every stage, in the order of the model."""
    last = plan.pp - 1
    return [
        (dense, moe, index == 0, index == last)
        for index, (dense, moe) in enumerate(stage_layers(model, plan))
    ]


def stage_layers(model: ModelSpec, plan: Plan) -> list[tuple[int, int]]:
    """Return (dense, mixture) layers of every stage; chunk c of stage s is the (c * pp + s)-th of the model."""
    chunks = plan.layers_by_chunk(model.num_layers)
    return _dealt(chunks, pp=plan.pp, num_dense=model.num_layers - model.num_moe_layers)


@lru_cache(maxsize=4096)
def _dealt(chunks: tuple[int, ...], *, pp: int, num_dense: int) -> list[tuple[int, int]]:
    """Deal chunks out to `pp` stages in turn; the first `num_dense` layers have no experts."""
    found = [[0, 0] for _ in range(pp)]
    first = 0
    for position, layers in enumerate(chunks):
        dense = min(layers, max(0, num_dense - first))
        found[position % pp][0] += dense
        found[position % pp][1] += layers - dense
        first += layers
    return [(dense, moe) for dense, moe in found]


def _stage(model: ModelSpec, plan: Plan, index: int, *, dense_layers: int, moe_layers: int) -> StageShape:
    has_embedding, has_head = index == 0, index == plan.pp - 1
    root = model.embedding_parameters / plan.tp if has_embedding else 0.0
    if has_head:
        root += model.norm_parameters
    # A tied head on another stage than the token table is a copy of it.
    if has_head and (plan.pp > 1 or not model.tied_embeddings):
        root += model.vocab_size * model.hidden_size / plan.tp
    experts = _experts_per_layer(model, plan)
    dense_layer, moe_layer = model.dense_layer_parameters / plan.tp, model.moe_layer_parameters(0) / plan.tp
    return StageShape(
        index=index,
        dense_layers=dense_layers,
        moe_layers=moe_layers,
        has_embedding=has_embedding,
        has_head=has_head,
        parameters=root + dense_layers * dense_layer + moe_layers * moe_layer,
        expert_parameters=moe_layers * experts,
        layer_parameters=max(
            dense_layer if dense_layers else 0.0, moe_layer + experts if moe_layers else 0.0
        ),
        root_parameters=root,
    )


def _experts_per_layer(model: ModelSpec, plan: Plan) -> float:
    """Return the parameters of the experts of one layer on one rank."""
    return model.moe.num_experts * model.expert_parameters / (plan.ep * plan.etp) if model.moe else 0.0


def owned_parameters(stage: StageShape, plan: Plan) -> float:
    """Parameters that the fullest rank owns where they are sharded over all ranks that hold the same ones."""
    replicas, pieces = expert_replicas(plan), stage.expert_pieces
    share = math.ceil(pieces / replicas) / pieces if pieces else 1 / replicas
    return stage.parameters / (plan.dp * plan.cp) + stage.expert_parameters * share


def expert_replicas(plan: Plan) -> float:
    """Ranks that hold the same experts."""
    return max(1.0, plan.dp * plan.cp * plan.tp / (plan.ep * plan.etp))
