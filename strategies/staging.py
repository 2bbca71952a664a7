"""Copies of a rank's state in host memory, for what writes it to disk while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from strategies.spec import BESIDE

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# As long as ranks may take to write their parts: they meet when all have.
WRITE_TIMEOUT = timedelta(hours=2)


class HostCopy:
    """One copy in host memory, made anew in the same memory each time; and a group to meet in beside the training."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        on_device = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_device,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_device,
            )
        )
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            [self.group] = groups_like([dist.group.WORLD])

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return `state` with every tensor's bytes copied; what was returned before is overwritten."""
        copied: dict[str, Any] = self._stager.stage(state)
        return copied


def groups_like(groups: Sequence[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """Return a group in host memory for each of `groups`, of its ranks; all ranks call this with those they are in.

    They are for threads: collectives of two threads on one group would meet each other. Not by local synchronization,
    which names a group by how many of its ranks this rank has seen.
    """
    import torch.distributed as dist

    mine = [tuple(dist.get_process_group_ranks(group)) for group in groups]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    named = sorted({ranks for theirs in everybody for ranks in theirs})
    kind: dict[str, Any] = {"backend": "gloo", "timeout": WRITE_TIMEOUT, "group_desc": BESIDE}
    made = {ranks: dist.new_group(ranks, **kind) for ranks in named}
    return [made[ranks] for ranks in mine]


def num_bytes(state: Any) -> int:
    """Bytes of all tensors below `state` on this rank."""
    return sum(tensor.numel() * tensor.element_size() for tensor in local_tensors(state))


def local_tensors(state: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor below nested mappings and sequences; of a DTensor this rank's part."""
    import torch

    if isinstance(state, torch.Tensor):
        yield state.to_local() if hasattr(state, "to_local") else state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from local_tensors(value)
    elif isinstance(state, Sequence) and not isinstance(state, str):
        for value in state:
            yield from local_tensors(value)


def share_of(state: Mapping[str, Any], *, rank: int, world_size: int) -> dict[str, Any]:
    """Return this rank's part of a nested state that all ranks hold whole: about equal bytes, each tensor once.

    Everything that is no tensor stays on rank 0.
    """
    leaves = dict(_leaves(state, ()))
    sizes = sorted(((num_bytes(leaf), path) for path, leaf in leaves.items()), reverse=True)
    loads, owner = [0] * world_size, {}
    for size, path in sizes:
        owner[path] = loads.index(min(loads)) if size else 0
        loads[owner[path]] += size
    part: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if owner[path] == rank:
            inner = part
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = leaf
    return part


def _leaves(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), inner
