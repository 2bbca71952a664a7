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
    return [part.optimizer for part in _parts(optimizer) if part.optimizer is not None]


def names_of(chunks: Sequence[torch.nn.Module], optimizer: Any, *, sharded: bool) -> dict[int, str]:
    """Return the names of what is moved, by `id`; a copy of what another rank moves has none."""
    shards = {id(whole): shard for part in _parts(optimizer) for whole, shard in _shards(part)}
    names = {}
    for name, parameter in parameters_of(chunks).items():
        if _is_counted(parameter, sharded=sharded):
            # The optimizer moves one of these.
            for moved in (parameter, getattr(parameter, "main_param", None), shards.get(id(parameter))):
                names[id(moved)] = name
    return names


def _parts(optimizer: Any) -> Sequence[Any]:
    """Dense parameters and experts may have optimizers of their own."""
    parts: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


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
