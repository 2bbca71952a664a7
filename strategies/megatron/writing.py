"""Megatron-core's dist_checkpointing, of which planning and writing are one call: at once, or in a thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


def begin(
    state: dict[str, Any],
    directory: Path,
    *,
    group: dist.ProcessGroup | None,
    validate: bool,
    still: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> Callable[[], None]:
    """Write what is not tensors; return what plans and writes those, as `still` returns them on the host.

    The ranks meet in `group`. With `validate` they exchange in training's groups what each holds, and every element is
    found to be written once.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Upstream's queue is a server process, which a rank that is killed would leave behind.
    filesystem_async._results_queue = Queue()
    request = dist_checkpointing.save(
        state,
        str(directory),
        sharded_strategy=_in_thread(group, still=still),
        validate_access_integrity=validate,
        async_sharded_save=True,
    )
    return partial(request.async_fn, directory)


def _in_thread(
    group: dist.ProcessGroup | None, *, still: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> Any:
    """Return upstream's way to save, of what `still` returns: planning and writing are left to one call for a thread.

    Upstream plans in training's group before it returns (state_dict_saver.py, save_state_dict_async_plan), writes in
    processes forked for it, from memory it shares with training where that lies on a CPU, and meets in training's group
    when all have written (torch.py, _get_save_and_finalize_callbacks).
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import torch as upstream
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

    class InThread(upstream.TorchDistSaveShardedStrategy):  # type: ignore[misc]
        def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
            mine, _, _ = upstream._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            tensors = [part for parts in mine.values() for part in parts if isinstance(part, ShardedTensor)]
            for part, data in zip(tensors, still([part.data.detach() for part in tensors]), strict=True):
                part.data = data
            state = upstream.mcore_to_pyt_state_dict(mine, False)  # objects become bytes, tensors stay
            return AsyncRequest(partial(_write, state, group), (), [])

    return InThread("torch_dist", 1)


def _write(state: dict[str, Any], group: dist.ProcessGroup | None, directory: Path) -> None:
    """Plan with all ranks who writes what, and write this rank's files; then rank 0 writes what lists them."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    writer = FileSystemWriterAsync(directory, thread_count=2)
    # Not its cache: that takes the first save's plan for all, and leaves out what the state has gained since
    # (state_dict_saver.py, local_step).
    (_, metadata, _), *_ = save_state_dict_async_plan(state, writer, group, 0, planner=planner)
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
