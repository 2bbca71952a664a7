"""What is to be planned: the `plan` section with its pins, the inputs of a ranking, and what no plan can help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from launcher.cluster.spec import ClusterSpec
from launcher.errors import PlanError
from launcher.planner.calibration import Calibration
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Recompute, TrainingSpec, check_nvme_path

_COUNTS = (
    "dp",
    "tp",
    "pp",
    "vp",
    "cp",
    "ep",
    "etp",
    "micro_batch_size",
    "num_microbatches",
    "recompute_num_layers",
)
_DEGREES = frozenset(Plan(strategy="", dp=1).rank_order)


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
    recompute_num_layers: int | None = None  # of each stage, with recompute=full; 0: all
    recompute_modules: tuple[str, ...] | None = None  # with recompute=selective
    pipeline_split: tuple[int, ...] | None = None  # layers of each chunk; empty: the same everywhere
    rank_order: tuple[str, ...] | None = None  # fastest-varying first
    sequence_parallel: bool | None = None
    offload_optimizer: bool | None = None
    offload_parameters: bool | None = None
    nvme_path: str | None = None  # folder on every node's disk for what is offloaded; null: host memory

    def __post_init__(self) -> None:
        for key in _COUNTS:
            value, lowest = getattr(self, key), 0 if key == "recompute_num_layers" else 1
            if value is not None and value < lowest:
                raise ValueError(
                    f"plan.{key}={value} must be at least {lowest}; null lets the planner choose"
                )
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"plan.zero_stage={self.zero_stage} is not a ZeRO stage; use one of 0, 1, 2, 3")
        for key, kind in (("recompute_num_layers", "full"), ("recompute_modules", "selective")):
            if getattr(self, key) is not None and self.recompute not in (None, kind):
                raise ValueError(
                    f"plan.{key}={text_of(getattr(self, key))} has no effect with "
                    f"plan.recompute={self.recompute}; use plan.recompute={kind} or null"
                )
        if self.rank_order is not None and sorted(self.rank_order) != sorted(_DEGREES):
            raise ValueError(
                f"plan.rank_order={text_of(self.rank_order)} must name each of {', '.join(sorted(_DEGREES))} once"
            )
        check_nvme_path(self.nvme_path, offloads=bool(self.offload_optimizer or self.offload_parameters))
        self._check_split()

    def _check_split(self) -> None:
        split = self.pipeline_split
        if not split:
            return
        if min(split) < 0:
            raise ValueError(f"plan.pipeline_split={text_of(split)} must name the layers of each chunk")
        chunks = (self.pp or 1) * (self.vp or 1)
        if len(split) % chunks or (self.pp and self.vp and len(split) != chunks):
            raise ValueError(
                f"plan.pipeline_split={text_of(split)} names {len(split)} chunks, not plan.pp * plan.vp; "
                "set plan.pp and plan.vp to null, or name as many"
            )

    def pins(self) -> dict[str, Any]:
        """Return what is pinned, by key."""
        return {key: value for key, value in vars(self).items() if value is not None}


def pinned(plan: Plan) -> PlanRequest:
    """Return the request that allows this plan only."""
    given = {f.name: getattr(plan, f.name) for f in fields(PlanRequest)}
    # Layers and modules of another kind of recomputation cannot be pinned.
    if plan.recompute != "full":
        given["recompute_num_layers"] = None
    if plan.recompute != "selective":
        given["recompute_modules"] = None
    return PlanRequest(**given)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be planned: the inputs of a ranking."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    request: PlanRequest
    strategies: tuple[str, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None  # factors from a finished run


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
    if request.pipeline_split and sum(request.pipeline_split) != model.num_layers:
        raise PlanError(
            f"plan.pipeline_split={text_of(request.pipeline_split)} holds {sum(request.pipeline_split)} layers, "
            f"not model.num_layers={model.num_layers}"
        )
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


def text_of(value: Any) -> str:
    """Write a value as it is written on the command line."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    low = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return low + [number // value for value in reversed(low) if value * value != number]


def listed(values: list[int], *, most: int = 12) -> str:
    """Write values as text, the first `most` of them."""
    return ", ".join(str(value) for value in values[:most]) + (", ..." if len(values) > most else "")
