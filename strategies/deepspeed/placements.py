"""Where a rank's parameters lie in the tensors of Hugging Face: tensor parallel parts, experts, tied copies.

It imports DeepSpeed; import it late.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

from strategies.deepspeed.boxes import Index, Placement

# AutoEP's names -> transformers' tensor, and which part of its rows (moe/ep_repack.py).
_EXPERTS = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}


def placements_of(engine: Any, *, tp_rank: int) -> dict[str, Placement]:
    """Return the place of each parameter, by the name that the engine's module gives it."""
    network = getattr(engine.module, "network", engine.module)  # of a pipeline, this stage's part
    tied = network._tied_weights_keys if network.config.tie_word_embeddings else {}
    experts = dict(_experts(network))
    found = {}
    for name, parameter in engine.module.named_parameters():
        if name in experts:
            found[name] = experts[name]
        else:
            is_copy = name in tied  # the other end of a pipeline holds the original
            found[name] = _dense(tied.get(name, name), parameter, tp_rank=tp_rank, is_copy=is_copy)
    return found


def _dense(name: str, parameter: torch.Tensor, *, tp_rank: int, is_copy: bool) -> Placement:
    shape = _shape(parameter)
    meta = getattr(parameter, DS_AUTOTP_UC_META, None) or {}
    axis = meta.get("partition_dim")
    if axis is None:
        return Placement(name=name, shape=shape, shift=(0,) * len(shape), is_copy=is_copy or tp_rank > 0)
    shift = [0] * len(shape)
    shift[axis] = sum(meta["partition_sizes"][:tp_rank])
    return Placement(name=name, shape=tuple(meta["logical_shape"]), shift=tuple(shift), is_copy=is_copy)


def _experts(network: torch.nn.Module) -> Iterator[tuple[str, Placement]]:
    """Yield what AutoEP has put in place of transformers' own layers."""
    for prefix, module in network.named_modules():
        if not getattr(module, "_is_autoep_layer", False):
            continue
        gate = _shape(module.router.gate.weight)
        yield (
            f"{prefix}.router.gate.weight",
            Placement(name=f"{prefix}.gate.weight", shape=gate, shift=(0, 0)),
        )
        for ours, (theirs, part) in _EXPERTS.items():
            shape = _shape(getattr(module.experts, ours))
            rows = shape[1] * (2 if theirs == "gate_up_proj" else 1)
            shift = (module.ep_rank * module.num_local_experts, part * shape[1], 0)
            name, whole = f"{prefix}.experts.{theirs}", (module.num_experts, rows, shape[2])
            yield f"{prefix}.experts.{ours}", Placement(name=name, shape=whole, shift=shift)


def _shape(parameter: torch.Tensor) -> Index:
    """Return what ZeRO-3 remembers of a shape that it has taken away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
