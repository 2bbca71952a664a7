"""Model and optimizer through Megatron-core's dist_checkpointing: written under one plan, read under another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import staging
from strategies.megatron import writing

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Each parameter's state as a tensor of the parameter's own shape, whatever the degrees: the one form that any other
# plan can read. Layers are named by their number in the model. A sharded optimizer's state meets on the first rank of a
# data parallel group, which writes it; upstream's default holds all of it in the host memory of every rank.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


def save(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Write this rank's part into `directory`."""
    import torch.distributed as dist

    with gathered(chunks):
        state = whole_state(chunks, optimizer)
        writing.begin(state, directory, group=dist.group.WORLD, validate=True, still=_on_host)()


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in tensors]


def load(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Restore what any plan of this model wrote."""
    from megatron.core import dist_checkpointing

    with gathered(chunks):
        state = dist_checkpointing.load(whole_state(chunks, optimizer, loading=True), str(directory))
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(state[f"model{index}"])
        optimizer.load_state_dict(state["optimizer"])


def sharded(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers below `optimizer` that spread their state over data parallel ranks: all of them, or none."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    every = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each for each in every if isinstance(each, DistributedOptimizer)]


def open_groups(optimizer: MegatronOptimizer) -> None:
    """Give what is sharded groups in host memory to be gathered in; all ranks call this."""
    found = sharded(optimizer)
    groups = staging.groups_like([each.data_parallel_group for each in found])
    for each, group in zip(found, groups, strict=True):
        each.data_parallel_group_gloo = group


def whole_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, loading: bool = False
) -> dict[str, Any]:
    """Weights and optimizer by the model's own names; gathers what a sharded optimizer has spread."""
    model = model_state(chunks)
    return {**model, "optimizer": optimizer_state(optimizer, model, loading=loading)}


def model_state(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    """The weights of this rank, where they lie now."""
    return {
        f"model{index}": chunk.module.sharded_state_dict(metadata=dict(_METADATA))
        for index, chunk in enumerate(chunks)
    }


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, loading: bool = False) -> Any:
    """The optimizer's state, its tensors described by those of `model`."""
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA))
    every = state.values() if len(getattr(optimizer, "chained_optimizers", ())) > 1 else [state]
    for each in every:
        # Ranks where no shares meet have none, which upstream would take for a difference between them.
        if "param_state" in each and each["param_state"] is None:
            del each["param_state"]
    return state


@contextmanager
def gathered(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Have all weights whole: with overlapped gathers they are so only once the next forward pass has begun."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
