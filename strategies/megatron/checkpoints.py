"""Model and optimizer through Megatron-core's dist_checkpointing: written under one plan, read under another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from strategies import staging
from strategies.staging import HostCopy

if TYPE_CHECKING:
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


def save(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Write this rank's part into `directory`."""
    from megatron.core import dist_checkpointing

    _keep_results_here()
    with gathered(chunks):
        state = _sharded_state(chunks, optimizer, loading=False)
        dist_checkpointing.save(state, str(directory))


class Snapshots:
    """Copies for saves beside the training, one at a time.

    The first one has all ranks exchange what each holds, and every element found to be written once.
    """

    def __init__(self) -> None:
        self._way = _in_thread(HostCopy())
        self._validated = False

    def take(
        self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path
    ) -> Callable[[], None]:
        """Copy what this rank writes; return what writes it, without a collective of training's groups.

        Gathering and planning, which need all ranks in training's own groups, are done before this returns.
        """
        from megatron.core import dist_checkpointing

        _keep_results_here()
        with gathered(chunks):
            state = _sharded_state(chunks, optimizer, loading=False)
            request = dist_checkpointing.save(
                state,
                str(directory),
                sharded_strategy=self._way,
                validate_access_integrity=not self._validated,
                async_sharded_save=True,
            )
        self._validated = True
        return partial(request.async_fn, directory)


def num_bytes(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> int:
    """Bytes of what this rank writes, at most: main replicas of weights and of the optimizer's state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    with gathered(chunks):
        values = nested_values(_sharded_state(chunks, optimizer, loading=False))
    mine = (v.data for v in values if isinstance(v, ShardedTensor) and is_main_replica(v.replica_id))
    return sum(staging.num_bytes(data) for data in mine if data is not None)


def _keep_results_here() -> None:
    """Replace upstream's queue, a server process that a rank that is killed would leave behind."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = Queue()


def _in_thread(copy: HostCopy) -> Any:
    """Return upstream's way to save, with a copy where it plans, and the writing in one call for a thread.

    Upstream writes in processes forked for it, from memory it shares with training where that lies on a CPU, and meets
    in training's group when all have written (torch.py, _get_save_and_finalize_callbacks).
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class InThread(TorchDistSaveShardedStrategy):  # type: ignore[misc]
        def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
            _, metadata, _ = planned
            buckets = writer.write_buckets
            held = {str(i): [tensor for _, tensor in data[1]] for i, (_, _, data) in enumerate(buckets)}
            copied = copy.take(held)
            writer.write_buckets = [
                (
                    file,
                    key,
                    (data[0], [(item, t) for (item, _), t in zip(data[1], copied[str(i)], strict=True)]),
                )
                for i, (file, key, data) in enumerate(buckets)
            ]
            return AsyncRequest(partial(_write, writer, metadata, copy.group), (), [])

    # Not cached_metadata: it takes the first save's plan for all, and leaves out what the state has gained since
    # (state_dict_saver.py, local_step).
    return InThread("torch_dist", 1)


def _write(writer: Any, metadata: Any, group: dist.ProcessGroup | None, directory: Path) -> None:
    """Write this rank's files; once all ranks have, rank 0 writes what lists them."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    own: Queue[Any] = Queue()
    written: list[Any] = []
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []  # since torch 2.7
    for index, bucket in enumerate(writer.write_buckets):
        count: Queue[int] = Queue()
        count.put(index)
        writer.write_preloaded_data(transforms, index, bucket, own, count, True)
        written.append(own.get()[1])
    failed = next((result for result in written if isinstance(result, Exception)), None)
    mine = failed or [result for results in written for result in results]
    everybody: list[Any] = [mine]
    if group is not None:
        everybody = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, mine, group=group)
    if errors := [result for result in everybody if isinstance(result, Exception)]:
        raise errors[0]
    if metadata is not None:  # rank 0
        writer.finish(metadata, everybody)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))


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
