"""Hugging Face Accelerate: PyTorch's own DDP (`zero_stage` 0) and FSDP2 (2 and 3). The reference and the default."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import hf, histograms, process, routing, staging
from strategies.base import Capabilities, StateBytes, StepResult, Strategy
from strategies.engine_options import check
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from transformers import PreTrainedModel

    from strategies.base import MicroBatch
    from strategies.bins import Histograms
    from strategies.inspection import Inspection

# What of Accelerate's settings may be passed through. `sync_each_batch` trades memory for communication:
# true reduces gradients after every micro-batch (FSDP2's default here: gradients stay sharded), false keeps
# whole gradients on every rank until the last one (DDP's default).
ENGINE_KEYS: Mapping[str, Any] = {
    "ddp": dict.fromkeys(
        (
            "broadcast_buffers",
            "bucket_cap_mb",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
        )
    ),
    "fsdp": dict.fromkeys(("auto_wrap_policy", "min_num_params", "transformer_cls_names_to_wrap")),
    "sync_each_batch": None,
}

OWNED_ENGINE_KEYS: Mapping[str, str] = {
    "mixed_precision": "training.precision",
    "gradient_accumulation_steps": "plan.num_microbatches",
    "fsdp.reshard_after_forward": "plan.zero_stage",
    "fsdp.mixed_precision_policy": "training.precision",
    "fsdp.activation_checkpointing": "plan.recompute",
    "fsdp.cpu_offload": "plan.offload_parameters",
}

CAPABILITIES = Capabilities(
    zero_stages=frozenset({0, 2, 3}),
    precisions=frozenset({"fp32", "bf16"}),
    recompute=frozenset({"none", "full"}),
    # DDP: fp32 throughout; in bf16, autocast keeps its cast weights until the backward pass has used them.
    state_bytes={
        "fp32": StateBytes(weights=4, gradients=4, optimizer=8),
        "bf16": StateBytes(weights=4, gradients=4, optimizer=8, gathered=2, keep_gathered=True),
    },
    # FSDP2 shards fp32 weights at both stages. Stage 2 keeps the gathered copy (the weights that the forward
    # pass reads) until the backward pass and frees it there; stage 3 frees it layer by layer.
    stage_state_bytes={
        ("fp32", 2): StateBytes(weights=4, gradients=4, optimizer=12, regathers=True),
        ("bf16", 2): StateBytes(weights=2, gradients=4, optimizer=12, regathers=True),
        ("fp32", 3): StateBytes(weights=4, gradients=4, optimizer=8, gathered=4),
        ("bf16", 3): StateBytes(weights=4, gradients=4, optimizer=8, gathered=2),
    },
    shards_whole_experts=True,
    shards_single_rank=False,
    reshardable=frozenset({"dp", "zero_stage"}),
    engine_keys=ENGINE_KEYS,
    owned_engine_keys=OWNED_ENGINE_KEYS,
    sync_engine_key="sync_each_batch",
    unpriced_engine_keys=frozenset({"ddp.bucket_cap_mb", "ddp.gradient_as_bucket_view", "fsdp"}),
)


class AccelerateStrategy(Strategy):
    """One process a GPU; all ranks are data parallel."""

    capabilities = CAPABILITIES
    _copy: staging.HostCopy | None = None
    _num_experts: int | None = None

    create_weights = staticmethod(hf.create_weights)

    def setup(self, plan: Plan, model: ModelSpec, training: TrainingSpec, weights: Path) -> None:
        """Wrap the model of `weights` in DDP or FSDP2."""
        self._enter(plan, training)
        self._num_experts = None if model.moe is None else model.moe.num_experts
        sharded_elsewhere = plan.zero_stage > 0 and self.dp_rank > 0
        build = hf.build_empty_model if sharded_elsewhere else hf.build_model
        self._wrap(build(weights, model))

    def _enter(self, plan: Plan, training: TrainingSpec) -> None:
        if refusal := self.capabilities.why_not(plan):
            raise ValueError(refusal)
        check(plan.engine, self.capabilities)
        self._plan, self._training = plan, training
        hf.be_quiet()
        process.set_deterministic(training)
        # Of a checkpoint written by one process, which is meant. Not around the call: a thread may make it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        process.local_device()
        before = dict(os.environ)
        self._accelerator = _create_accelerator(plan, training)
        # Accelerate speaks to transformers, and to its next instance, through variables.
        self._replaced = {n: before.get(n) for n, value in os.environ.items() if value != before.get(n)}
        self.dp_rank = self._accelerator.process_index
        process.seed_everything(training, rank=self.dp_rank)

    def _wrap(self, network: PreTrainedModel) -> None:
        hf.enable_recompute(network, self._plan)
        self._balance = hf.balance_coefficient(network)
        groups = hf.parameter_groups(network, self._training)
        optimizer = hf.create_optimizer(groups, self._training)
        self._model, self._optimizer = self._accelerator.prepare(network, optimizer)

    def train_step(self, batches: Sequence[MicroBatch], *, learning_rate: float) -> StepResult:
        """Accumulate over the micro-batches, clip by the global norm, step."""
        assert len(batches) == self._plan.num_microbatches, (
            "the trainer must pass plan.num_microbatches batches"
        )
        hf.set_learning_rate(self._optimizer, learning_rate)
        losses = []
        for index, batch in enumerate(batches):
            with self._communication(last=index == len(batches) - 1):
                loss, reported = hf.training_losses(
                    self._model, batch, self._accelerator.device, balance=self._balance
                )
                self._accelerator.backward(loss)
            losses.append(reported)
        limit = self._training.max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), limit)
        self._optimizer.step()
        # DDP's gradients are views into its buckets; dropping them would make accumulation pay for both.
        self._optimizer.zero_grad(set_to_none=self._plan.zero_stage > 0)
        loss, own = process.means_of(losses)
        return StepResult(loss=loss, grad_norm=_to_float(norm), rank_loss=own)

    def counting_experts(self) -> AbstractContextManager[Mapping[int, Sequence[int]]]:
        """Watch transformers' routers."""
        if self._num_experts is None:
            return nullcontext({})
        return routing.counting(routing.routers_of([self._model]), num_experts=self._num_experts)

    def taking_histograms(self) -> AbstractContextManager[Histograms]:
        """Count this rank's shards; of DDP's equals the first counts."""
        if self._plan.zero_stage == 0 and self.dp_rank > 0:
            return nullcontext({})
        network = self._accelerator.unwrap_model(self._model)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        return histograms.taking([self._optimizer.optimizer], histograms.whole(names))

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss without gradients."""
        import torch

        self._model.eval()
        with torch.no_grad():
            losses = [hf.model_loss(self._model, batch, self._accelerator.device) for batch in batches]
        self._model.train()
        _reshard(self._model)
        return process.mean_of(losses)

    def save(self, directory: Path) -> None:
        """Write sharded model and optimizer with torch's distributed checkpoint."""
        self._write(self._own_state(), directory)

    def snapshot_bytes(self) -> int:
        """Of what this rank writes: its shard, or its share of what all ranks hold."""
        return staging.num_bytes(self._own_state())

    def snapshot(self, directory: Path) -> Callable[[], None]:
        """Copy what `save` would write."""
        if self._copy is None:
            self._copy = staging.HostCopy()
        state, group = self._copy.take(self._own_state()), self._copy.group
        return lambda: self._write(state, directory, group=group)

    def _write(
        self, state: dict[str, Any], directory: Path, *, group: dist.ProcessGroup | None = None
    ) -> None:
        from torch.distributed import checkpoint

        checkpoint.save(state, checkpoint_id=directory, process_group=group, no_dist=self._plan.dp == 1)

    def load(self, directory: Path) -> None:
        """Restore it; number of ranks and ZeRO stage may differ from those that wrote it."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        checkpoint.load(state, checkpoint_id=directory, no_dist=self._plan.dp == 1)
        set_state_dict(
            self._model,
            self._optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def export(self, directory: Path) -> None:
        """Gather the weights on rank 0, in fp32, as they are trained."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self._model, options=options)
        if self.dp_rank == 0:
            self._accelerator.unwrap_model(self._model).save_pretrained(directory, state_dict=state)
        self._accelerator.wait_for_everyone()

    def teardown(self) -> None:
        """Forget the model and Accelerate's process-wide state."""
        from accelerate.state import AcceleratorState, GradientState

        del self._model, self._optimizer, self._accelerator
        self._copy = None
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name, value in self._replaced.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value

    @classmethod
    def inspect(cls, plan: Plan, model: ModelSpec, training: TrainingSpec, *, rank: int) -> Inspection:
        """Set up and step as one rank of a world that is not there."""
        from strategies.fake_world import empty_batches, fake_world, leave_unsent, measure

        # A longer step holds no more than two micro-batches do; DDP's gradients are there before the first.
        few = min(plan.num_microbatches, 2 if plan.zero_stage else 1)
        plan, strategy = replace(plan, num_microbatches=few), cls()
        with fake_world(rank=rank, world_size=plan.world_size) as ledger:
            strategy._enter(plan, training)
            if plan.zero_stage:
                # The shards are made where they stay; to fill them from rank 0 there is nothing.
                strategy._accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
            strategy._wrap(hf.build_unfilled_model(model))
            if plan.zero_stage == 0 and plan.dp > 1:
                strategy._model.register_comm_hook(None, lambda state, bucket: leave_unsent(bucket))
            batches = empty_batches(plan, training)
            found = measure(
                ledger,
                network=strategy._model,
                optimizer=strategy._optimizer.optimizer,
                step=lambda: strategy.train_step(batches, learning_rate=0.0),
                # Stage 2 reads gathered weights until the backward pass; the shards serve the optimizer.
                gathered=plan.zero_stage == 2,
            )
            strategy.teardown()
        return found

    def _communication(self, *, last: bool) -> AbstractContextManager[Any]:
        sharded = self._plan.zero_stage > 0
        every = self._plan.engine.get("sync_each_batch", sharded)
        if last or every or self._plan.dp == 1:
            return nullcontext()
        # Accelerate's `no_sync` does nothing for FSDP2 on a CPU.
        if sharded:
            return _unreduced(self._model)
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._model)
        return context

    def _own_state(self) -> dict[str, Any]:
        """What this rank writes: of a state that every rank holds whole, each writes a part."""
        state = self._state()
        if self._plan.zero_stage or self._plan.dp == 1:
            return state
        return staging.share_of(state, rank=self.dp_rank, world_size=self._plan.dp)

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self._model, self._optimizer.optimizer)
        return {"model": model, "optimizer": optimizer}


def _create_accelerator(plan: Plan, training: TrainingSpec) -> Accelerator:
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    ddp = {"gradient_as_bucket_view": True, **plan.engine.get("ddp", {})}
    if training.deterministic:
        # DDP re-orders its buckets after the first step, so the sums of a resumed run would be ordered
        # differently for one step; looking for unused parameters turns that off.
        ddp.setdefault("find_unused_parameters", True)
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    plugin = _fsdp_plugin(plan) if plan.zero_stage else None
    with _one_process() if plan.dp == 1 else nullcontext():
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no" if plan.precision == "fp32" else plan.precision,
            gradient_accumulation_steps=plan.num_microbatches,
            fsdp_plugin=plugin if torch.cuda.is_available() else None,
            kwargs_handlers=[DistributedDataParallelKwargs(**ddp)],
        )
    if plugin and not torch.cuda.is_available():
        _allow_fsdp_on_cpu(accelerator, plugin)
    return accelerator


def _fsdp_plugin(plan: Plan) -> FullyShardedDataParallelPlugin:
    import torch
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Gradients are reduced and accumulated in fp32 whatever the layers compute in.
    policy = None
    if plan.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"auto_wrap_policy": "transformer_based_wrap", **plan.engine.get("fsdp", {})}
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=plan.zero_stage == 3,
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=True,
        **options,
    )


def _allow_fsdp_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Accelerate takes FSDP for GPUs only; nothing on the way needs one, and so a plan can be tried anywhere."""
    from accelerate import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


@contextmanager
def _one_process() -> Iterator[None]:
    """Hide a launcher's variables: for them, Accelerate would open a process group for a single rank."""
    from unittest import mock

    import torch

    with mock.patch.dict(os.environ):
        if torch.cuda.is_available():
            os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{torch.cuda.current_device()}"
        for name in ("LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        yield


@contextmanager
def _unreduced(network: Any) -> Iterator[None]:
    """Let gradients pile up whole on every rank (FSDP2)."""
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def _reshard(network: torch.nn.Module) -> None:
    """Free what a forward pass without backward left gathered (FSDP2)."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _to_float(norm: Any) -> float:
    """A DTensor's norm is a sum over shards that has yet to be made."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
