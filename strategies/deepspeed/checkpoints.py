"""Weights and Adam's moments through torch's distributed checkpoint: written under one plan, read under any other.

Every rank writes the blocks it holds, as blocks of the tensors that Hugging Face names; so there is nothing to convert.
DeepSpeed's own files keep flat partitions, and its universal loader refuses another ZeRO stage (stage3.py,
load_hp_checkpoint_state_from_checkpoint_dir_stage3, reads what only stage 3 wrote; stage 0 has no reader).
It imports torch; import it late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from strategies import staging
from strategies.deepspeed.holdings import KINDS, Holdings, Piece, Reader
from strategies.staging import HostCopy

_STEP = "step"
_BUFFER = "buffer."
# Name and place in the whole tensor -> kind of state, and where it lies here.
_Blocks = Mapping[tuple[str, torch.Size], tuple[str, Piece]]


def save(holdings: Holdings, directory: Path) -> None:
    """Write this rank's blocks into `directory`; every rank calls it."""
    state = {_STEP: torch.tensor(holdings.step_count()), **_buffers(holdings)}
    with Reader(holdings) as reader:
        checkpoint.save(state, checkpoint_id=directory, planner=_Saving(_blocks(holdings), reader))


class Snapshots:
    """Copies for saves beside the training, one at a time."""

    def __init__(self) -> None:
        self._copy = HostCopy()

    def take(self, holdings: Holdings, directory: Path) -> Callable[[], None]:
        """Copy what this rank writes; return what writes it, in no group of training's."""
        copied = self._copy.take({"flats": _written(holdings), "buffers": _buffers(holdings)})
        state = {_STEP: torch.tensor(holdings.step_count()), **copied["buffers"]}
        planner = _Saving(_blocks(holdings), _Copies(copied["flats"]))
        return partial(
            checkpoint.save,
            state,
            checkpoint_id=directory,
            planner=planner,
            process_group=self._copy.group,
        )


def num_bytes(holdings: Holdings) -> int:
    """Bytes of a snapshot on this rank; 0 where some of the state lies on a disk and is read piece by piece."""
    if len(holdings.batches()) > 1:
        return 0
    return staging.num_bytes(_written(holdings)) + staging.num_bytes(_buffers(holdings))


def _written(holdings: Holdings) -> dict[str, torch.Tensor]:
    """Return the flat tensors in which this rank has something to write."""
    groups = dict.fromkeys(piece.group for piece in holdings.pieces() if not piece.placement.is_copy)
    return {_flat(kind, group): holdings.flat(kind, group) for group in groups for kind in KINDS}


def _flat(kind: str, group: int) -> str:
    return f"{kind}.{group}"


class _Copies:
    """Reads blocks of copied flat tensors."""

    def __init__(self, flats: Mapping[str, torch.Tensor]) -> None:
        self._flats = flats

    def read(self, kind: str, piece: Piece) -> torch.Tensor:
        return piece.of(self._flats[_flat(kind, piece.group)])


def load(holdings: Holdings, directory: Path) -> None:
    """Read what any plan of this model wrote; a group on a disk is filled alone."""
    if not (directory / ".metadata").is_file():
        raise RuntimeError(
            f"{directory} holds no checkpoint that this release of strategy=deepspeed wrote; start from another one"
        )
    buffers, step = _buffers(holdings), torch.tensor(0)
    state: dict[str, torch.Tensor] = {_STEP: step, **buffers}
    for groups in holdings.batches():
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(holdings.opened(group, writing=True))
            checkpoint.load(
                state, checkpoint_id=directory, planner=_Loading(_blocks(holdings, groups), holdings)
            )
            for group in groups:
                holdings.set_step_count(group, int(step))
    holdings.finish()


def _buffers(holdings: Holdings) -> dict[str, torch.Tensor]:
    return {f"{_BUFFER}{name}": tensor for name, tensor in holdings.buffers().items()}


def _blocks(holdings: Holdings, groups: Collection[int] | None = None) -> _Blocks:
    """Return the blocks of every kind, group by group."""
    return {
        (f"{kind}.{piece.placement.name}", torch.Size(piece.target.offsets)): (kind, piece)
        for _, found in groupby(holdings.pieces(), lambda piece: piece.group)
        for kind, piece in product(KINDS, list(found))
        if groups is None or piece.group in groups
    }


class _Saving(DefaultSavePlanner):  # type: ignore[misc]
    """Adds blocks to a state of whole tensors."""

    def __init__(self, blocks: _Blocks, reader: Reader | _Copies) -> None:
        super().__init__(flatten_state_dict=False)
        self._blocks, self._reader = blocks, reader

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([*super().create_local_plan().items, *self._items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for name, stored in metadata.state_dict_metadata.items():
            # Upstream checks that no two blocks overlap; then none lacks where their sizes add up.
            found = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            assert found == stored.size.numel(), (
                f"{found} of {stored.size.numel()} elements of {name} are held"
            )
        return plans, metadata

    def _items(self) -> Iterator[WriteItem]:
        for (name, offsets), (_, piece) in self._blocks.items():
            if not piece.placement.is_copy:
                chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(piece.box.sizes))
                data = TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=torch.float32),
                    size=torch.Size(piece.placement.shape),
                )
                index = MetadataIndex(name, offsets)
                yield WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        kind, piece = self._blocks[write_item.index.fqn, write_item.index.offset]
        return self._reader.read(kind, piece)


class _Loading(DefaultLoadPlanner):  # type: ignore[misc]
    """Reads blocks beside a state of whole tensors."""

    def __init__(self, blocks: _Blocks, holdings: Holdings) -> None:
        super().__init__(flatten_state_dict=False)
        self._blocks, self._holdings = blocks, holdings

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([*super().create_local_plan().items, *self._items()])

    def _items(self) -> Iterator[ReadItem]:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        for (name, offsets), (_, piece) in self._blocks.items():
            found, shape = stored.get(name), torch.Size(piece.placement.shape)
            if not isinstance(found, TensorStorageMetadata) or found.size != shape:
                raise RuntimeError(
                    f"the checkpoint holds no tensor '{name}' of the shape {tuple(shape)}; it is of another model"
                )
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(piece.box.sizes))
            yield from create_read_items_for_chunk_list(name, found, [chunk])

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        if index.fqn in self.state_dict:
            return super().lookup_tensor(index)
        kind, piece = self._blocks[index.fqn, index.offset]
        return piece.of(self._holdings.flat(kind, piece.group))
