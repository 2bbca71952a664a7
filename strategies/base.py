"""The one interface: Strategy, what it can do (Capabilities) and what a step returns (StepResult)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from strategies.model_spec import ModelSpec
from strategies.spec import Plan, Precision, TrainingSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from strategies.bins import Histograms
    from strategies.inspection import Inspection

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
    `fresh_gradients` are those of the layer at hand before they are added to the buffer, which stays as it is;
    `step` is what the optimizer makes for one step and frees again, sharded as its state is; `gradient_copies`
    are whole on every rank and never sent. `host` lies on the host beside an optimizer that is offloaded, sharded as
    its state is.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float = 0.0
    keep_gathered: bool = False
    regathers: bool = False
    whole_gradients: bool = False
    fresh_gradients: float = 0.0
    gradient_copies: float = 0.0
    step: float = 0.0
    host: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an engine runs a layer, as far as time and memory depend on it; the plan says everything else."""

    # Norms, activations, rotary embeddings and the loss as one kernel each (Transformer Engine, Liger, torch.compile).
    fused_kernels: bool = False
    # flash3: FlashAttention-3, and cuDNN as Transformer Engine uses it; flash: FlashAttention-2; flash1: the first;
    # the others store the scores, and fused_softmax makes one kernel of scaling, masking and softmax (Megatron-LM
    # before FlashAttention).
    attention: Literal["flash3", "flash", "flash1", "fused_softmax", "unfused"] = "flash"
    # Kernels replayed instead of launched one by one: of parts of each layer, or of the whole step.
    cuda_graphs: Literal["none", "partial", "full"] = "none"
    # Each token travels once to every rank that holds one of its experts, not once to every expert (DeepEP).
    deduplicated_dispatch: bool = False
    overlap_gradients: bool = True  # reduced beside the backward pass
    overlap_parameters: bool = True  # gathered for the next layer beside the one at hand
    overlap_tp: bool = False  # tensor parallel collectives beside the products they feed
    # Backward only: beside the products for weight gradients (Korthikanti et al. 2022, section 6.2).
    overlap_tp_backward: bool = False
    # Products for weight gradients add into the fp32 buffer themselves, where a kernel of its own would read and write
    # it again (Apex' and Transformer Engine's gradient accumulation fusion).
    fused_accumulation: bool = False
    split_messages: bool = (
        True  # tensor parallel ranks each send a part to the next stage, which gathers it there
    )
    overlap_pp: bool = False  # messages between stages beside computation
    reduces_after_pipeline: bool = False  # gradients of a pipeline are reduced when it has run dry
    # Context parallel ranks swap their parts of the sequence for parts of the heads (Ulysses, arXiv 2309.14509), where
    # otherwise keys and values go round a ring.
    heads_over_cp: bool = False
    overlap_ep: bool = False  # tokens to experts of one micro-batch beside the computation of another
    # Tokens of the rank with the busiest experts, over the mean: 1 is a router that spreads them evenly.
    expert_imbalance: float = 1.0
    frozen_weights: bool = False  # only small adapters are trained (LoRA, arXiv 2106.09685)
    dropout: bool = False  # masks are kept for the backward pass (the recipes of GPT-2 and GPT-3)
    eager_activation: bool = False  # the MLP's activation is several kernels even where norms are one
    # fp8 and nvfp4: inputs of matrix products are kept in 8 bits (Transformer Engine).
    quantized_inputs: bool = False
    # Selective recomputation keeps attention's and every second matrix product's output (PyTorch's per-operator
    # policy, torchtitan) instead of following plan.recompute_modules.
    selective_operators: bool = False
    # Where full recomputation keeps the inputs of layers: on every rank, split over tensor parallel ranks
    # (Megatron-LM's distribute_saved_activations, DeepSpeed's partition_activations), or in host memory (its
    # cpu_checkpointing).
    checkpoints: Literal["whole", "split", "host"] = "whole"
    offloaded_layers: int = 0  # so many layers of each stage keep their activations in host memory
    # Bytes of all copies of one logit at the loss' peak. None: in eager PyTorch the logits, an fp32 copy, the
    # log-probabilities and the gradient; with fused kernels the logits and one fp32 copy. 0: never whole (Liger).
    bytes_per_logit: float | None = None
    gathered_logits: bool = False  # the loss sees the whole vocabulary on every tensor parallel rank


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
    nvme_stages: frozenset[int] = frozenset()  # what is offloaded may lie on a disk (plan.nvme_path)
    swapped_elements: int = 0  # of a rank's optimizer state, as many are in host memory at a time
    model_types: frozenset[str] | None = None  # None: every family of Hugging Face
    rank_order: tuple[str, ...] = ("tp", "cp", "dp", "pp")
    other_rank_orders: tuple[tuple[str, ...], ...] = ()  # which the engine can be told to use instead
    uneven_pipeline: bool = False  # stages may hold different numbers of layers
    partial_recompute: bool = False  # plan.recompute=full for some layers of each stage
    recompute_modules: frozenset[str] = (
        frozenset()
    )  # what plan.recompute=selective may name, beside core_attn
    # The engine pads the vocabulary to a multiple of this times tp; 0: tp has to divide it as it is.
    vocabulary_multiple: int = 0
    # Each returns one sentence why a plan is impossible, or None. They may look at switches, and at which degrees
    # exceed 1, but at no other number: the planner asks once for all sizes.
    rules: tuple[Callable[[Plan], str | None], ...] = ()
    # As `rules`, where the kind of model decides as well: its family, whether it has experts; none of its sizes.
    model_rules: tuple[Callable[[Plan, ModelSpec], str | None], ...] = ()
    execution: Execution = field(default_factory=Execution)
    # ZeRO cuts a layer's experts between, never inside, one of them (FSDP2 cuts the first dimension, and transformers
    # keeps a layer's experts in one tensor): with more ranks than experts, some ranks hold a whole one.
    shards_whole_experts: bool = False
    copies_kv_heads: bool = True  # where tensor parallel ranks are more than key/value heads
    fills_pipeline: bool = False  # a pipeline needs at least as many micro-batches as stages
    shards_single_rank: bool = True  # do ZeRO stages above 0 exist where there is nothing to shard over?
    # Keys of the plan in which load() accepts a checkpoint of another plan.
    reshardable: frozenset[str] = frozenset()
    # Where a ZeRO stage holds something else than `state_bytes` of its precision says.
    stage_state_bytes: Mapping[tuple[Precision, int], StateBytes] = field(default_factory=dict)
    # The same where the optimizer is offloaded.
    offload_state_bytes: Mapping[tuple[Precision, int], StateBytes] = field(default_factory=dict)
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
        key = (plan.precision, plan.zero_stage)
        state = self.stage_state_bytes.get(key, self.state_bytes[plan.precision])
        if plan.offload_optimizer:
            state = self.offload_state_bytes.get(key, state)
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

    def why_not(self, plan: Plan, model: ModelSpec | None = None) -> str | None:
        """One sentence why this plan is not possible with this engine (and this kind of model), or None."""
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
        found = self._why_not_switches(plan) or self._why_not_shape(plan)
        found = found or next((reason for rule in self.rules if (reason := rule(plan))), None)
        if found or model is None:
            return found
        return next((reason for rule in self.model_rules if (reason := rule(plan, model))), None)

    def _why_not_shape(self, plan: Plan) -> str | None:
        if plan.pipeline_split and not self.uneven_pipeline:
            return f"{plan.strategy} has equal stages only; use plan.pipeline_split=null"
        if plan.recompute_num_layers and not (self.partial_recompute and plan.recompute == "full"):
            remedy = "plan.recompute=full" if self.partial_recompute else "plan.recompute_num_layers=null"
            return (
                f"{plan.strategy} has no plan.recompute_num_layers={plan.recompute_num_layers} with "
                f"plan.recompute={plan.recompute}; use {remedy}"
            )
        modules = frozenset({"core_attn"}) | self.recompute_modules
        if not modules.issuperset(plan.recompute_modules):
            unknown = next(name for name in plan.recompute_modules if name not in modules)
            return (
                f"{plan.strategy} cannot recompute {unknown} alone (plan.recompute_modules); "
                f"use some of {_listed(modules)}"
            )
        if plan.rank_order not in (self.rank_order, *self.other_rank_orders):
            orders = " or ".join(
                f"[{','.join(order)}]" for order in (self.rank_order, *self.other_rank_orders)
            )
            return (
                f"{plan.strategy} cannot place its ranks as plan.rank_order=[{','.join(plan.rank_order)}]; "
                f"use {orders}"
            )
        return None

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
        if plan.nvme_path and plan.zero_stage not in self.nvme_stages:
            remedy = f"plan.zero_stage in {_listed(self.nvme_stages)}" if self.nvme_stages else "null"
            return (
                f"{plan.strategy} cannot offload to plan.nvme_path={plan.nvme_path} with "
                f"plan.zero_stage={plan.zero_stage}; use {remedy}"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step reports, the same on every rank unless it says otherwise."""

    loss: float  # mean over the tokens of the global batch, nats
    grad_norm: float  # before clipping
    skipped: bool = False  # fp16 overflow: the optimizer did not move
    # Mean over this rank's own tokens; None where it computes no loss, as before the last pipeline stage.
    rank_loss: float | None = None


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

    def counting_experts(self) -> AbstractContextManager[Mapping[int, Sequence[int]]]:
        """Around a `train_step`: how many tokens chose each expert, by layer; known on leaving, summed over no ranks.

        Nothing where there are no experts, or where the engine's routers cannot be found.
        """
        return nullcontext({})

    def taking_histograms(self) -> AbstractContextManager[Histograms]:
        """Around a `train_step`: histograms of the weights before it and of clipped gradients, known on leaving.

        Each rank counts what no other rank counts, so that the counts of all ranks are the model's.
        """
        return nullcontext({})

    @abstractmethod
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss over all ranks' batches, without training. Every rank passes equally many."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write this rank's part of model and optimizer into `directory`, which exists."""

    def snapshot_bytes(self) -> int:
        """Host memory that a `snapshot` takes on this rank; 0: this engine writes at once."""
        return 0

    def snapshot(self, directory: Path) -> Callable[[], None]:
        """Copy this rank's state; return what writes it into `directory` as `save` does, while training goes on.

        A thread runs it, the same one on every rank and one save after the other: it shares no process group with
        training. Raises what `save` raises.
        """
        self.save(directory)
        return lambda: None

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""

    def export(self, directory: Path) -> None:
        """Write the weights as a Hugging Face folder; every rank calls it, rank 0 writes."""
        raise ValueError(
            f"{type(self).__name__} does not export weights yet; use strategy=accelerate or megatron where that matters"
        )

    @abstractmethod
    def teardown(self) -> None:
        """Free what `setup` took. The process group belongs to the worker."""

    @classmethod
    def inspect(cls, plan: Plan, model: ModelSpec, training: TrainingSpec, *, rank: int) -> Inspection:
        """Build what `rank` of the planned world would hold, without that world; raise what the engine raises."""
        raise ValueError(
            f"strategy={plan.strategy} builds no rank without its world, so nothing of it can be verified"
        )


def _listed(values: frozenset[int] | frozenset[str]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested options."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
