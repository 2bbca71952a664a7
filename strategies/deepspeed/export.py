"""The fp32 master weights as a folder of Hugging Face weights: one tensor at a time, one file at a time.

It imports torch; import it late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from strategies import hf
from strategies.deepspeed.boxes import Box, Index
from strategies.deepspeed.holdings import WEIGHT, Holdings, Piece, Reader
from strategies.model_spec import ModelSpec
from strategies.weight_files import MAX_SHARD_BYTES, Writer, config_for, plan_files


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One block of a tensor, and the rank that has it."""

    rank: int
    shape: Index  # of the tensor
    box: Box


def export(
    holdings: Holdings,
    *,
    model: ModelSpec,
    source: Path,
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights as they are trained, in fp32; every rank calls it, rank 0 writes.

    `source` holds the model's config.json. Rank 0 keeps the tensors of one file, and one tensor, at a time.
    """
    own = {
        (piece.placement.name, piece.target): piece
        for piece in holdings.pieces()
        if not piece.placement.is_copy
    }
    sources, buffers = _find_sources(own), holdings.buffers()
    writer = None
    if dist.get_rank() == 0:
        as_saved = hf.renaming(source, model)
        unfilled = {name: torch.empty(found[0].shape, device="meta") for name, found in sources.items()}
        saved = [as_saved({name: tensor}) for name, tensor in (*unfilled.items(), *buffers.items())]
        sizes = [(name, tensor.nbytes) for tensors in saved for name, tensor in tensors.items()]
        writer = Writer(directory, plan_files(sizes, max_shard_bytes))
    with Reader(holdings) as reader:
        for name, found in sources.items():
            whole = _bring(name, found, own, reader)
            if writer and whole is not None:
                writer.add(as_saved({name: whole}))
    if writer:
        for name, tensor in buffers.items():
            writer.add(as_saved({name: tensor}))
        writer.finish(config_for(source, torch.float32))


def _find_sources(own: dict[tuple[str, Box], Piece]) -> dict[str, list[_Source]]:
    """Return where every tensor's blocks are, the same on every rank: of replicas the first one."""
    everywhere: list[list[tuple[str, Index, Box]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(
        everywhere, [(name, piece.placement.shape, box) for (name, box), piece in own.items()]
    )
    sources: dict[str, dict[Box, _Source]] = {}
    for rank, blocks in enumerate(everywhere):
        for name, shape, box in blocks:
            sources.setdefault(name, {}).setdefault(box, _Source(rank=rank, shape=shape, box=box))
    for name, found in sources.items():
        covered = sum(box.numel for box in found)
        assert covered == math.prod(next(iter(found.values())).shape), f"{name} is not covered exactly once"
    return {name: list(found.values()) for name, found in sources.items()}


def _bring(
    name: str, sources: list[_Source], own: dict[tuple[str, Box], Piece], reader: Reader
) -> torch.Tensor | None:
    """Return the whole tensor on rank 0, and None elsewhere."""
    rank = dist.get_rank()
    whole = torch.empty(sources[0].shape, dtype=torch.float32) if rank == 0 else None
    for source in sources:
        block = reader.read(WEIGHT, own[name, source.box]) if source.rank == rank else None
        if whole is None:
            if block is not None:
                dist.send(block.to(reader.device).contiguous(), dst=0)
            continue
        if block is None:
            block = torch.empty(source.box.sizes, dtype=torch.float32, device=reader.device)
            dist.recv(block, src=source.rank)
        place = tuple(slice(a, b) for a, b in zip(source.box.offsets, source.box.ends, strict=True))
        whole[place] = block.cpu()
    return whole
