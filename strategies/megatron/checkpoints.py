"""Model and optimizer through Megatron-core's dist_checkpointing: written under one plan, read under another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


def save(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Write this rank's part into `directory`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Upstream's own is a server process, which a rank that is killed would leave behind; results of a synchronous
    # save never leave this process.
    filesystem_async._results_queue = Queue()
    with gathered(chunks):
        state = _sharded_state(chunks, optimizer, loading=False)
        dist_checkpointing.save(state, str(directory))


def load(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Restore what any plan of this model wrote."""
    from megatron.core import dist_checkpointing

    with gathered(chunks):
        state = dist_checkpointing.load(_sharded_state(chunks, optimizer, loading=True), str(directory))
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(state[f"model{index}"])
        optimizer.load_state_dict(state["optimizer"])


def _sharded_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, loading: bool
) -> dict[str, Any]:
    # Each parameter's state as a tensor of the parameter's own shape, whatever the degrees: the one form that any
    # other plan can read. Layers are named by their number in the model.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
    }
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=dict(metadata))
        for index, chunk in enumerate(chunks)
    }
    return {**model, "optimizer": optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)}


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
