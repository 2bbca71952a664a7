"""Copies of a rank's state for saves beside the training: gathering, planning and writing work on them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import staging
from strategies.megatron import checkpoints, writing
from strategies.staging import HostCopy

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class Snapshots:
    """Copies for saves beside the training, one at a time, and groups of their own to meet in.

    The first save of a start is gathered in training's groups: there all ranks exchange what each holds, and every
    element is found to be written once. From then on ranks copy what they hold and go on.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._copy = HostCopy()
        self._groups = staging.groups_like(
            [each.data_parallel_group_gloo for each in checkpoints.sharded(optimizer)]
        )
        self._validated = False

    def take(
        self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path
    ) -> Callable[[], None]:
        """Copy what this rank holds; return what gathers, plans and writes it, in none of training's groups."""
        with checkpoints.gathered(chunks):
            if self._groups and self._validated:
                return self._take_shards(chunks, optimizer, directory)
            state = checkpoints.whole_state(chunks, optimizer)
            write = writing.begin(
                state, directory, group=self._copy.group, validate=not self._validated, still=self._still
            )
        self._validated = True
        return write

    def _take_shards(
        self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, directory: Path
    ) -> Callable[[], None]:
        """Copy weights and this rank's share of the optimizer, as they lie; the thread gathers the shares."""
        if hasattr(optimizer, "chained_optimizers"):
            optimizer._synchronize_steps()
        live = checkpoints.model_state(chunks)
        shards = [_shards(each) for each in checkpoints.sharded(optimizer)]
        copied = self._copy.take(
            {
                "weights": {str(id(part)): part.data.detach() for part in _written(live)},
                "shards": [[dict(tensors) for tensors in each.values()] for each in shards],
            }
        )
        weights = _with_data(live, copied["weights"])
        tables = [
            dict(zip(each, tensors, strict=True))
            for each, tensors in zip(shards, copied["shards"], strict=True)
        ]
        frozen = self._frozen(optimizer, tables)

        def write() -> None:
            # `live` tells names and shapes alone.
            state = {**weights, "optimizer": checkpoints.optimizer_state(frozen, live)}
            writing.begin(state, directory, group=self._copy.group, validate=False, still=list)()

        return write

    def _frozen(self, optimizer: MegatronOptimizer, tables: list[dict[Any, dict[str, torch.Tensor]]]) -> Any:
        """Return an optimizer that tells of the copies, and gathers them in the groups of this class."""
        frozen = []
        for each, table, group in zip(checkpoints.sharded(optimizer), tables, self._groups, strict=True):
            one = copy.copy(each)
            one.state_dict = partial(dict, copy.deepcopy(each.state_dict()))
            one._get_main_param_and_optimizer_states = table.__getitem__
            one.data_parallel_group_gloo = group
            frozen.append(one)
        if not hasattr(optimizer, "chained_optimizers"):
            return frozen[0]
        chained = copy.copy(optimizer)
        chained.chained_optimizers = frozen
        chained._synchronize_steps = lambda: None
        return chained

    def _still(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        copied: list[torch.Tensor] = self._copy.take({"tensors": tensors})["tensors"]
        return copied


def _shards(optimizer: DistributedOptimizer) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """This rank's slices of the state, by the parameters they belong to."""
    return {
        parameter: optimizer._get_main_param_and_optimizer_states(parameter)
        for ranges in optimizer.gbuf_ranges
        for buckets in ranges.values()
        for bucket in buckets
        for parameter in bucket["param_map"]
    }


def _written(state: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the tensors that this rank writes of `state`; of those that are cut when they are written, the whole."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            yield value


def _with_data(state: dict[str, Any], data: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return `state` with the tensors of `data` in the place of those it was read from."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace

    def exchanged(value: Any) -> Any:
        return replace(value, data=data[str(id(value))]) if str(id(value)) in data else value

    found: dict[str, Any] = dict_list_map_outplace(exchanged, state)
    return found


def num_bytes(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> int:
    """Bytes of a snapshot on this rank: its copies, and where shares of an optimizer meet, twice their whole."""
    with checkpoints.gathered(chunks):
        model = checkpoints.model_state(chunks)
        sharded = checkpoints.sharded(optimizer)
        if not sharded:
            state = {**model, "optimizer": checkpoints.optimizer_state(optimizer, model)}
            return sum(staging.num_bytes(part.data) for part in _written(state))
        held: int = sum(staging.num_bytes(part.data) for part in _written(model))
        held += sum(staging.num_bytes(list(_shards(each).values())) for each in sharded)
    # Three fp32 tensors an element: as they come from each rank, and as one (distrib_optimizer.py,
    # get_parameter_state_dp_zero).
    meeting = [each for each in sharded if each.data_parallel_group_gloo.rank() == 0]
    elements: int = sum(buffer.numel_unpadded for each in meeting for buffer in each.buffers)
    return held + 2 * 3 * 4 * elements
