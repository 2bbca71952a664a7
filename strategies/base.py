"""The one interface: Strategy, what it can do (Capabilities) and what a step returns (StepResult)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Precision, TrainingSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    # (micro_batch_size, sequence_length + 1) token ids: inputs are [:, :-1], labels [:, 1:].
    MicroBatch = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that one parameter costs before any sharding, in one precision.

    `weights` is the copy the forward pass reads, `gradients` the buffer that accumulates, `optimizer`
    the master weights (where separate) plus Adam's two moments. ZeRO shards `optimizer` from stage 1,
    `gradients` from stage 2 and `weights` from stage 3. `gathered` is a further copy that is never sharded;
    it lives while a layer computes, or with `keep_gathered` from a layer's forward to its backward pass.
    With `regathers`, weights are gathered anew for every micro-batch, whatever the stage; `whole_gradients`
    are kept on every rank and reduced once a step, where the stage would shard and reduce them every time.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float = 0.0
    keep_gathered: bool = False
    regathers: bool = False
    whole_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an engine runs a layer, as far as time and memory depend on it; the plan says everything else."""

    # Norms, activations, rotary embeddings and the loss as one kernel each (Transformer Engine, Liger, torch.compile).
    fused_kernels: bool = False
    attention: Literal["flash", "flash1", "unfused"] = "flash"  # flash1: the first FlashAttention; unfused: scores stored
    cuda_graphs: bool = False  # kernels are not launched one by one from the host
    overlap_gradients: bool = True  # reduced beside the backward pass
    overlap_parameters: bool = True  # gathered for the next layer beside the one at hand
    overlap_tp: bool = False  # tensor parallel collectives beside the products they feed
    overlap_pp: bool = False  # messages between stages beside computation
    overlap_ep: bool = False  # tokens to experts of one micro-batch beside the computation of another
    frozen_weights: bool = False  # only small adapters are trained (LoRA, arXiv 2106.09685)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do. The planner reads this and nothing else."""

    zero_stages: frozenset[int]
    precisions: frozenset[str]
    recompute: frozenset[str]
    state_bytes: Mapping[Precision, StateBytes]
    degrees: frozenset[str] = frozenset()  # of tp, pp, vp, cp, ep, etp: which may exceed 1 (dp always may)
    sequence_parallel: bool = False
    offload_optimizer_stages: frozenset[int] = frozenset()  # ZeRO stages that allow it
    offload_parameters_stages: frozenset[int] = frozenset()
    model_types: frozenset[str] | None = None  # None: every family of Hugging Face
    rank_order: tuple[str, ...] = ("tp", "cp", "dp", "pp")
    execution: Execution = field(default_factory=Execution)
    shards_single_rank: bool = True  # do ZeRO stages above 0 exist where there is nothing to shard over?
    reshardable: bool = False  # can load() accept a checkpoint of another plan?
    # Where a ZeRO stage holds something else than `state_bytes` of its precision says.
    stage_state_bytes: Mapping[tuple[Precision, int], StateBytes] = field(default_factory=dict)
    # Communication buffers of a ZeRO stage above 0: so many elements, but not more than the model has.
    buffer_elements: int = 0
    # Keys that `strategy.engine` may hold: name -> None (a value) or a nested mapping of keys.
    engine_keys: Mapping[str, Any] = field(default_factory=dict)
    # Engine keys that the plan or another section decides: dotted key -> our key.
    owned_engine_keys: Mapping[str, str] = field(default_factory=dict)
    # Keys the engine knows for parts of it that are never called here.
    unused_engine_keys: frozenset[str] = frozenset()
    # Dotted engine keys that the prediction follows: false keeps whole gradients; so many elements a bucket.
    sync_engine_key: str = ""
    buffer_engine_key: str = ""
    # Engine keys, or groups of them, that change memory in a way that nothing here predicts.
    unpriced_engine_keys: frozenset[str] = frozenset()

    def state_bytes_of(self, plan: Plan) -> StateBytes:
        """Return what one parameter costs under the precision, ZeRO stage and engine keys of `plan`."""
        state = self.stage_state_bytes.get(
            (plan.precision, plan.zero_stage), self.state_bytes[plan.precision]
        )
        given = dict(_flat(plan.engine))
        # A single micro-batch is the last one, and that one is always reduced.
        whole = (
            plan.zero_stage >= 2 and plan.num_microbatches > 1 and given.get(self.sync_engine_key) is False
        )
        return replace(state, whole_gradients=True) if whole else state

    def buffer_elements_of(self, plan: Plan) -> int:
        """Return how many elements the communication buffers of `plan` hold at most."""
        return int(dict(_flat(plan.engine)).get(self.buffer_engine_key, self.buffer_elements))

    def unpriced(self, engine: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the engine keys given that change memory without the prediction following."""
        names = self.unpriced_engine_keys
        return tuple(
            key
            for key, _ in _flat(engine)
            if any(key == name or key.startswith(f"{name}.") for name in names)
        )

    def why_not(self, plan: Plan) -> str | None:
        """One sentence why this plan is not possible with this engine, or None."""
        for degree in ("tp", "pp", "vp", "cp", "ep", "etp"):
            value = getattr(plan, degree)
            if value > 1 and degree not in self.degrees:
                return f"{plan.strategy} does not offer plan.{degree}={value} here; use plan.{degree}=1"
        if plan.zero_stage not in self.zero_stages:
            return (
                f"{plan.strategy} has no plan.zero_stage={plan.zero_stage}; "
                f"use one of {_listed(self.zero_stages)}"
            )
        if plan.precision not in self.precisions:
            return (
                f"{plan.strategy} cannot train in training.precision={plan.precision}; "
                f"use one of {_listed(self.precisions)}"
            )
        if plan.recompute not in self.recompute:
            return (
                f"{plan.strategy} has no plan.recompute={plan.recompute}; "
                f"use one of {_listed(self.recompute)}"
            )
        if plan.zero_stage > 0 and plan.dp * plan.cp == 1 and not self.shards_single_rank:
            return (
                f"{plan.strategy} cannot shard plan.zero_stage={plan.zero_stage} over a single data parallel rank; "
                "use plan.zero_stage=0, or more GPUs"
            )
        return self._why_not_switches(plan)

    def _why_not_switches(self, plan: Plan) -> str | None:
        if plan.sequence_parallel and not self.sequence_parallel:
            return f"{plan.strategy} does not offer plan.sequence_parallel=true here; use false"
        for key, stages in (
            ("offload_optimizer", self.offload_optimizer_stages),
            ("offload_parameters", self.offload_parameters_stages),
        ):
            if getattr(plan, key) and plan.zero_stage not in stages:
                remedy = f"use plan.zero_stage in {_listed(stages)}" if stages else f"use plan.{key}=false"
                return (
                    f"{plan.strategy} cannot combine plan.{key}=true with "
                    f"plan.zero_stage={plan.zero_stage}; {remedy}"
                )
        return None


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float  # mean over the tokens of the global batch, nats
    grad_norm: float  # before clipping
    skipped: bool = False  # fp16 overflow: the optimizer did not move


class Strategy(ABC):
    """One engine, run to one plan.

    Every rank calls `setup`, perhaps `load`, then `train_step`, `evaluate` and `save` as needed, then
    `teardown`.
    """

    capabilities: ClassVar[Capabilities]
    dp_rank: int  # which slice of the data this rank reads

    @staticmethod  # noqa: B027
    def create_weights(model: ModelSpec, training: TrainingSpec, directory: Path) -> None:
        """Write the seeded initial weights that every rank loads in `setup`; called on one rank, once a run.

        A strategy without real weights writes nothing.
        """

    @abstractmethod
    def setup(self, plan: Plan, model: ModelSpec, training: TrainingSpec, weights: Path) -> None:
        """Build model and optimizer from the Hugging Face folder `weights`."""

    @abstractmethod
    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepResult:
        """Consume `plan.num_microbatches` micro-batches and make one optimizer step."""

    @abstractmethod
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss over all ranks' batches, without training. Every rank passes equally many."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write this rank's part of model and optimizer into `directory`, which exists."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""

    @abstractmethod
    def teardown(self) -> None:
        """Free what `setup` took. The process group belongs to the worker."""


def _listed(values: frozenset[int] | frozenset[str]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested options."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
