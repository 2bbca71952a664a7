"""Streams Hugging Face weights into a rank's GPTModel chunks, and back into a folder that transformers reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.megatron import mapping
from strategies.megatron.folders import Folder
from strategies.megatron.mapping import Piece, Run
from strategies.model_spec import ModelSpec
from strategies.weight_files import MAX_SHARD_BYTES, Writer, config_for, plan_files

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


def load(chunks: Sequence[torch.nn.Module], *, model: ModelSpec, weights: Path) -> None:
    """Fill every parameter of this rank from the folder `weights`, or say in one sentence what does not fit."""
    import torch

    held, folder = _held(chunks), Folder(weights)
    mine = [piece for piece in _pieces(chunks, model) if _is_mine(piece, chunks)]
    lacking = [source for piece in mine for source in piece.sources() if not folder.has(source)]
    if lacking:
        raise ValueError(f"weights={weights} lacks {len(lacking)} tensors, '{lacking[0]}' among them")
    _check_pairs({piece.name for piece in mine}, set(held), model)
    with torch.no_grad():
        for piece in mine:
            _fill(held[piece.name], piece, folder)


def export(
    chunks: Sequence[torch.nn.Module],
    *,
    model: ModelSpec,
    source: Path,
    directory: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the trained weights as transformers names them; every rank calls this, global rank 0 writes.

    `source` holds the model's config.json; `directory` must not hold weights yet. `dtype` defaults to that of the
    parameters. Rank 0 keeps the tensors of one file, and one tensor, at a time.
    """
    import torch.distributed as dist

    dtype = dtype or next(chunks[0].parameters()).dtype
    config = config_for(source, dtype)
    if any(directory.glob("*.safetensors")):
        raise ValueError(f"directory={directory} already holds weights; give another folder")
    dist.barrier()  # no rank looks after rank 0 began to write
    pieces = [piece for piece in _pieces(chunks, model) if piece.exported]
    files = plan_files(_sizes(pieces, dtype), max_shard_bytes)
    writer = Writer(directory, files) if dist.get_rank() == 0 else None
    routes = _Routes(chunks, model)
    for piece in pieces:
        whole = routes.bring(piece, dtype)
        if writer:
            assert whole is not None
            writer.add(join(piece, whole))
    if writer:
        writer.finish(config)
    dist.barrier()


def _pieces(chunks: Sequence[torch.nn.Module], model: ModelSpec) -> Iterator[Piece]:
    from megatron.core import parallel_state

    return mapping.pieces(
        model,
        padded_vocab_size=_unwrap(chunks[0]).vocab_size,
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def _unwrap(chunk: torch.nn.Module) -> Any:
    """Return the GPTModel inside its wrappers for data parallelism and 16-bit numbers."""
    inner: Any = chunk
    while not hasattr(inner, "decoder"):
        inner = inner.module
    return inner


def parameters_of(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters by global name: layers and experts are counted over the whole model."""
    return {
        mapping.global_name(name, layers=_layers(chunk), first_expert=_experts(chunk).start): parameter
        for chunk in map(_unwrap, chunks)
        for name, parameter in chunk.named_parameters()
    }


def _held(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return this rank's tensors by global name; only the router's correction bias is a buffer."""
    held: dict[str, torch.Tensor] = {name: it.detach() for name, it in parameters_of(chunks).items()}
    for chunk in map(_unwrap, chunks):
        for name, buffer in chunk.named_buffers():
            if name.endswith("router.expert_bias"):
                name = mapping.global_name(name, layers=_layers(chunk), first_expert=_experts(chunk).start)
                held[name] = buffer.detach()
    return held


def _layers(chunk: Any) -> list[int]:
    """Return the layers of one chunk, counted over the whole model from 0."""
    return [layer.layer_number - 1 for layer in chunk.decoder.layers]


def _experts(chunk: Any) -> range:
    """Return this rank's experts."""
    from megatron.core import parallel_state

    local = (chunk.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first: int = local * parallel_state.get_expert_model_parallel_rank()
    return range(first, first + local)


def _is_mine(piece: Piece, chunks: Sequence[torch.nn.Module]) -> bool:
    return any(_is_in(piece, chunk) for chunk in map(_unwrap, chunks))


def _is_in(piece: Piece, chunk: Any) -> bool:
    if piece.layer is not None:
        is_here = piece.expert is None or piece.expert in _experts(chunk)
        return is_here and piece.layer in _layers(chunk)
    if piece.name.startswith("embedding."):
        return bool(chunk.pre_process)
    # On a single stage a tied head is the embedding itself.
    is_copy = not piece.exported and chunk.pre_process
    return bool(chunk.post_process) and not is_copy


def _check_pairs(given: set[str], held: set[str], model: ModelSpec) -> None:
    """Raise ValueError unless every parameter of the network has weights, and all weights a parameter."""
    for names, fault in ((held - given, "are filled by nothing"), (given - held, "have no parameter")):
        if names:
            raise ValueError(
                f"model.model_type={model.model_type} does not describe the Megatron-core network that was built: "
                f"{len(names)} tensors {fault}, {min(names)} among them; use the model these weights belong to"
            )


def _place(piece: Piece, tensor: torch.Tensor) -> tuple[int, int]:
    """Return which part of the piece this rank holds: (rank, of how many)."""
    from megatron.core import parallel_state

    is_whole = piece.may_be_whole and tensor.shape[piece.dim] == piece.shape[piece.dim]
    if piece.cut_over is None or is_whole:
        return 0, 1
    if piece.cut_over == "etp":
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return group.rank(), group.size()


def _fill(tensor: torch.Tensor, piece: Piece, folder: Folder) -> None:
    rank, degree = _place(piece, tensor)
    expected = tuple(size // degree if axis == piece.dim else size for axis, size in enumerate(piece.shape))
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"Megatron-core's {piece.name} has the shape {tuple(tensor.shape)} on this rank where the model of "
            f"weights={folder.path} needs {expected}; use the model these weights belong to"
        )
    fill(tensor, piece, piece.part(rank, degree), folder)


def fill(tensor: torch.Tensor, piece: Piece, runs: Sequence[Run], folder: Folder) -> None:
    """Write the runs one after the other into `tensor`, reading no more than them."""
    shapes, position = piece.sources(), 0
    for run in runs:
        target = tensor.narrow(piece.dim, position, run.length)
        if run.source is None:
            target.zero_()
        else:
            part = folder.read(run, axis=piece.source_axis, shape=shapes[run.source])
            target.copy_(part.T if piece.transposed else part)
        position += run.length


def join(piece: Piece, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Take a whole Megatron tensor apart into the Hugging Face tensors it is made of."""
    found = {source: whole.new_empty(shape) for source, shape in piece.sources().items()}
    position = 0
    for run in piece.runs:
        if run.source is not None:
            part = whole.narrow(piece.dim, position, run.length)
            target = found[run.source].narrow(piece.source_axis, run.start, run.length)
            target.copy_(part.T if piece.transposed else part)
        position += run.length
    return found


class _Routes:
    """Brings whole tensors to global rank 0: over the tensor, then the expert, then the pipeline group.

    In each stage only the first data parallel replica sends. Its first rank is number 0 in all its groups, dense and
    expert, because Megatron-core lays both grids over the same stages.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], model: ModelSpec) -> None:
        from megatron.core import parallel_state

        self._held = _held(chunks)
        self._stages: ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
        self._experts: ProcessGroup = parallel_state.get_expert_model_parallel_group()
        self._tensor: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self._expert_tensor: ProcessGroup = parallel_state.get_expert_tensor_parallel_group()
        self._sends = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        self._sends_experts = parallel_state.get_expert_data_parallel_rank() == 0
        self._owners = self._find_owners(chunks, model)
        self._per_rank = (model.moe.num_experts if model.moe else 0) // self._experts.size()
        self._device = next(chunks[0].parameters()).device

    def _find_owners(self, chunks: Sequence[torch.nn.Module], model: ModelSpec) -> list[int]:
        """Return the pipeline stage of every layer."""
        import torch
        import torch.distributed as dist

        device = next(chunks[0].parameters()).device
        owners = torch.zeros(model.num_layers, dtype=torch.int64, device=device)
        for chunk in map(_unwrap, chunks):
            owners[_layers(chunk)] = self._stages.rank()
        dist.all_reduce(owners, group=self._stages)
        stages: list[int] = owners.tolist()
        return stages

    def bring(self, piece: Piece, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the whole tensor on global rank 0; elsewhere the result means nothing."""
        dtype = _dtype(piece, dtype)
        is_expert = piece.expert is not None
        cutters = self._expert_tensor if is_expert else self._tensor
        expert_rank = (piece.expert or 0) // max(1, self._per_rank)
        if not (self._sends_experts if is_expert else self._sends):
            return None
        whole = None
        is_owner = self._stages.rank() == self._stage(piece)
        if is_owner and (not is_expert or self._experts.rank() == expert_rank):
            whole = self._gather(piece, dtype, cutters)
        if cutters.rank() != 0:
            return None
        if is_expert:
            if is_owner:
                whole = self._hand_over(whole, piece, dtype, self._experts, expert_rank)
            if self._experts.rank() != 0:
                return None
        return self._hand_over(whole, piece, dtype, self._stages, self._stage(piece))

    def _stage(self, piece: Piece) -> int:
        if piece.layer is not None:
            return self._owners[piece.layer]
        return 0 if piece.name.startswith("embedding.") else self._stages.size() - 1

    def _gather(self, piece: Piece, dtype: torch.dtype, group: ProcessGroup) -> torch.Tensor | None:
        import torch
        import torch.distributed as dist

        own = self._held[piece.name].to(dtype).contiguous()
        if _place(piece, own)[1] == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(group.size())] if group.rank() == 0 else None
        dist.gather(own, parts, dst=dist.get_global_rank(group, 0), group=group)
        return torch.cat(parts, dim=piece.dim) if parts else None

    def _hand_over(
        self, whole: torch.Tensor | None, piece: Piece, dtype: torch.dtype, group: ProcessGroup, sender: int
    ) -> torch.Tensor | None:
        """Move the tensor from rank `sender` of the group to its rank 0."""
        import torch
        import torch.distributed as dist

        if sender == 0:
            return whole
        if group.rank() == sender:
            assert whole is not None
            dist.send(whole, dst=dist.get_global_rank(group, 0), group=group)
        elif group.rank() == 0:
            whole = torch.empty(piece.shape, dtype=dtype, device=self._device)
            dist.recv(whole, src=dist.get_global_rank(group, sender), group=group)
        return whole


def _dtype(piece: Piece, dtype: torch.dtype) -> torch.dtype:
    """Return what a piece is written as: the router's correction bias stays in fp32, as both sides keep it."""
    import torch

    return torch.float32 if piece.name.endswith("router.expert_bias") else dtype


def _sizes(pieces: Iterable[Piece], dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of every Hugging Face tensor."""
    for piece in pieces:
        for name, shape in piece.sources().items():
            yield name, math.prod(shape) * _dtype(piece, dtype).itemsize
