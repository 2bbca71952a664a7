"""Histograms of weights and gradients as the optimizer takes them, in the bins of bins.py.

torch is imported inside the functions, so that the adapters can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from strategies.bins import BORDERS, Histograms

if TYPE_CHECKING:
    import torch

WEIGHTS, GRADIENTS = "weights", "gradients"
_AT_ONCE = 2**22  # elements whose bins are in memory at a time

Parts = Mapping[str, tuple[int, int]]  # name -> (offset, length) in what the optimizer moves, flattened


@contextmanager
def taking(
    optimizers: Iterable[torch.optim.Optimizer], parts_of: Callable[[torch.Tensor], Parts]
) -> Iterator[Histograms]:
    """Count while inside what torch's `optimizers` are given, behind reduction and clipping; known on leaving.

    `parts_of` names what lies where in a tensor that they move; what it does not name is not counted.
    """
    counts: dict[str, torch.Tensor] = {}
    told: Histograms = {}

    def take(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for moved in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            if moved.grad is None:
                continue
            for name, (offset, length) in parts_of(moved).items():
                for kind, whole in ((WEIGHTS, moved), (GRADIENTS, moved.grad)):
                    part = _local(whole).detach().reshape(-1).narrow(0, offset, length)
                    key = f"{kind}/{name}"
                    counts[key] = _count(part) + counts.get(key, 0)

    hooks = [optimizer.register_step_pre_hook(take) for optimizer in optimizers]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()
    told.update({key: _sparse(found.tolist()) for key, found in counts.items()})


def whole(names: Mapping[int, str]) -> Callable[[torch.Tensor], Parts]:
    """Return `parts_of` where the optimizer moves tensors one by one: their names by `id`."""

    def parts_of(moved: torch.Tensor) -> Parts:
        name = names.get(id(moved))
        return {} if name is None else {name: (0, _local(moved).numel())}

    return parts_of


def _count(values: torch.Tensor) -> torch.Tensor:
    import torch

    borders = torch.tensor(BORDERS, dtype=torch.float32, device=values.device)
    counts = torch.zeros(len(BORDERS) + 1, dtype=torch.long, device=values.device)
    for part in values.split(_AT_ONCE):
        bins = torch.bucketize(part.float(), borders, out_int32=True)
        counts += torch.bincount(bins, minlength=len(counts))
    return counts


def _local(tensor: Any) -> Any:
    """A DTensor's own shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _sparse(counts: Sequence[int]) -> dict[int, int]:
    return {place: count for place, count in enumerate(counts) if count}
