"""A rank's state as it lies in memory: upstream's own files round the master weights of 16-bit training away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this rank stands in the mesh, and whether data parallel ranks hold equal or different parts."""

    tp: int
    pp: int
    dp: int
    sharded: bool  # ZeRO: every data parallel rank has an optimizer state of its own
    whole_weights: bool = True  # not ZeRO 3, where the optimizer's tensors are this rank's weights

    @property
    def model_file(self) -> str:
        """Weights, the same for all data parallel ranks."""
        return f"weights_tp{self.tp:04d}_pp{self.pp:04d}.pt"

    @property
    def optimizer_file(self) -> str:
        """Optimizer state of this rank, or of the data parallel rank 0 that speaks for all."""
        return f"optimizer_tp{self.tp:04d}_pp{self.pp:04d}_dp{self.dp if self.sharded else 0:05d}.pt"


def save(directory: Path, model: Any, optimizer: Any, place: Place) -> None:
    """Write what no other rank writes."""
    import torch

    if place.dp == 0 and place.whole_weights:
        torch.save(_weights(model), directory / place.model_file)
    if place.dp == 0 or place.sharded:
        state = {"optimizer": optimizer.optim.state_dict(), "master": _master(optimizer)}
        torch.save(state, directory / place.optimizer_file)


def load(directory: Path, model: Any, optimizer: Any, place: Place) -> None:
    """Copy it back into the tensors that `setup` made."""
    if place.whole_weights:
        _copy(_weights(model), _read(directory / place.model_file))
    state = _read(directory / place.optimizer_file)
    optimizer.optim.load_state_dict(state["optimizer"])
    _copy(_master(optimizer), state["master"])
    for chunk in _chunks(optimizer):
        chunk.optim_update()


def _read(file: Path) -> Any:
    if not file.is_file():
        raise RuntimeError(f"{file} is missing; this checkpoint was written under another plan or is damaged")
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _copy(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    if own.keys() != saved.keys():
        raise RuntimeError(
            "the checkpoint holds other tensors than this plan; resume with the plan that wrote it"
        )
    import torch

    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.unwrap().named_parameters()}


def _chunks(optimizer: Any) -> list[Any]:
    """Gemini's chunks of weights in one order; none for other plugins."""
    return list(getattr(optimizer, "chunk16_set", ()))


def _master(optimizer: Any) -> dict[str, torch.Tensor]:
    """The fp32 tensors that Adam moves; where there is no such copy, the weights themselves."""
    if chunks := _chunks(optimizer):
        return {f"chunk{index}": chunk.paired_chunk.payload for index, chunk in enumerate(chunks)}
    parameters = [parameter for group in optimizer.optim.param_groups for parameter in group["params"]]
    return {str(index): parameter.data for index, parameter in enumerate(parameters)}


def export(booster: Any, model: Any, directory: Path) -> None:
    """Write the weights as a Hugging Face folder; rows that pad the vocabulary stay behind."""
    from colossalai.tensor.padded_tensor import api
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model.unwrap(), FullyShardedDataParallel):
        _export_shards(model.unwrap(), directory)
        return
    whole = api._hijack_back_detach_and_clone

    def give_methods_back(tensor: Any) -> Any:
        # A pipeline saves detached copies, which have the marks of padding and never had its methods.
        return whole(tensor) if hasattr(tensor, "_unpad_detach") else tensor

    with mock.patch.object(api, "_hijack_back_detach_and_clone", give_methods_back):
        booster.save_model(model, str(directory), shard=True, use_safetensors=True)


def _export_shards(network: Any, directory: Path) -> None:
    """Gather what FSDP cut. Upstream's own export leaves the configuration out (torch_fsdp_plugin.py:225) and dies on
    processors.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp._common_utils import FSDP_PREFIX

    gathered = network.summon_full_params(
        network, writeback=False, rank0_only=True, offload_to_cpu=torch.cuda.is_available()
    )
    with gathered:
        if dist.get_rank() == 0:
            named = network.module.named_parameters()
            state = {name.replace(FSDP_PREFIX, ""): value.detach().cpu().clone() for name, value in named}
            network.module.save_pretrained(directory, state_dict=state)
