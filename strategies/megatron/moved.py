"""What Megatron-core's optimizer moves on this rank, by name: whole parameters, fp32 copies, or shards of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from strategies.megatron.weights import parameters_of

if TYPE_CHECKING:
    import torch


def optimizers_of(optimizer: Any) -> list[Any]:
    """Return torch's optimizers beneath; one that has nothing to move on this rank is none."""
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [found for found in inner if found is not None]


def names_of(chunks: Sequence[torch.nn.Module], optimizer: Any, *, sharded: bool) -> dict[int, str]:
    """Return the names of what is moved, by `id`; a copy of what another rank moves has none."""
    names = {
        id(parameter): name
        for name, parameter in parameters_of(chunks).items()
        if _is_counted(parameter, sharded=sharded)
    }
    pairs = [
        pair
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for pair in _shards(part)
        if pair[1] is not None
    ]
    copies = {
        id(parameter): parameter.main_param
        for parameter in parameters_of(chunks).values()
        if getattr(parameter, "main_param", None) is not None
    }
    moved = {id(copy): names[own] for own, copy in copies.items() if own in names}
    moved |= {id(shard): names[id(parameter)] for parameter, shard in pairs if id(parameter) in names}
    return {**names, **moved}


def _shards(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (parameter, this rank's shard of it) of a distributed optimizer."""
    for whole, cut in (
        ("model_fp32_groups", "shard_fp32_groups"),
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ):
        groups = zip(getattr(part, whole, ()), getattr(part, cut, ()), strict=False)
        yield from chain.from_iterable(zip(own, shards, strict=True) for own, shards in groups)


def _is_counted(parameter: Any, *, sharded: bool) -> bool:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    if not getattr(parameter, "allreduce", True):  # an expert's
        return sharded or parallel_state.get_expert_data_parallel_rank() == 0
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    own = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    return bool(own) and (sharded or rank == 0)
