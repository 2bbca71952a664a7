"""How evenly routers spread tokens over experts: counted where they decide, in those steps that ask for it.

torch is imported inside the functions, so that the adapters can be read without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def routers_of(networks: Iterable[torch.nn.Module]) -> dict[int, torch.nn.Module]:
    """Return the routers in `networks` by the layer of the whole model, counted from 0.

    transformers, AutoEP and Megatron-core all have a module of its own that decides, and call it a router.
    """
    found = {}
    for network in networks:
        for name, module in network.named_modules():
            if type(module).__name__.endswith("Router"):
                found[_layer(name, module)] = module
    return found


@contextmanager
def counting(routers: dict[int, torch.nn.Module], *, num_experts: int) -> Iterator[dict[int, list[int]]]:
    """Count the choices that fall on each expert of each layer while inside; they are known on leaving.

    A recomputed layer decides twice, and counts twice: shares stay what they are.
    """
    counts: dict[int, torch.Tensor] = {}
    told: dict[int, list[int]] = {}

    def watch(layer: int) -> Any:
        def take(_module: Any, _inputs: Any, output: Any) -> None:
            found = choices(output, num_experts=num_experts)
            counts[layer] = counts[layer] + found if layer in counts else found

        return take

    hooks = [router.register_forward_hook(watch(layer)) for layer, router in routers.items()]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()
    told.update({layer: [int(count) for count in found.tolist()] for layer, found in counts.items()})


def choices(output: Any, *, num_experts: int) -> torch.Tensor:
    """Return how many tokens chose each expert, from what a router gives back.

    That is a tuple with the chosen experts in it: (tokens, top_k) indices, or a (tokens, num_experts) map of booleans.
    """
    import torch

    for chosen in (tensor for tensor in output if isinstance(tensor, torch.Tensor) and tensor.dim() == 2):
        if chosen.dtype == torch.bool:
            return chosen.sum(dim=0)
        if not chosen.is_floating_point():
            return torch.bincount(chosen.flatten(), minlength=num_experts)
    return torch.zeros(num_experts, dtype=torch.long)


def _layer(name: str, module: Any) -> int:
    """Megatron-core's stages count their layers from 0 each; its routers know better, from 1."""
    number = getattr(module, "layer_number", None)
    if number is not None:
        return int(number) - 1
    place = _LAYER.search(name)
    return int(place.group(1)) if place else 0
