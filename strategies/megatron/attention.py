"""Attention of the local layer spec, over a sequence split over ranks too; import it after `cpu.install()`.

Upstream leaves context parallelism and latent attention to Transformer Engine. Here every rank gathers all keys and
values and attends with its own queries, through upstream's unfused attention and its differentiable collectives: exact,
with scores of sequence^2 / cp elements a head. Ranks hold their part of the sequence as upstream deals it out
(`get_batch_on_this_cp_rank`): of 2 * cp equal chunks, rank r has chunks r and 2 * cp - 1 - r, so that causal attention
costs all ranks the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import is_layer_window_attention


def with_own_attention(spec: Any) -> Any:
    """Return a layer or decoder block spec with `CausalAttention` where it had upstream's unfused one."""
    spec = copy.deepcopy(spec)
    # One mask for all layers, and another where some have a window; upstream makes one for each layer and keeps it.
    params = {"hidden_positions": lru_cache(maxsize=2)(hidden_positions)}
    for layer in getattr(spec, "layer_specs", [spec]):
        attention = layer.submodules.self_attention.submodules
        if attention.core_attention is DotProductAttention:
            attention.core_attention = ModuleSpec(module=CausalAttention, params=params)
    return spec


class CausalAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention of this rank's queries to the keys and values of all context parallel ranks."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *args: Any,
        hidden_positions: Callable[..., torch.Tensor],
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(
                "strategy=megatron without Transformer Engine attends causally only, "
                f"and a layer asks for an attention mask of type {attn_mask_type.name}"
            )
        whole = copy.copy(config)
        # Upstream would refuse the first, and for the others mask positions as if they were in one piece.
        whole.context_parallel_size, whole.window_size, whole.masked_softmax_fusion = 1, None, False
        super().__init__(whole, layer_number, attn_mask_type, *args, pg_collection=pg_collection, **kwargs)
        if v_channels is not None:  # latent attention: values are shorter than queries and keys
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.num_earlier = config.window_size[0] if windowed else None
        self.cp_group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
        self.hidden_positions = hidden_positions

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map (sequence / cp, batch, heads, head size), of fewer heads for key and value, to as many joined heads.

        The mask follows from the positions, so that `attention_mask` has to be None.
        """
        if attention_mask is not None:
            raise ValueError(
                "strategies.megatron.attention makes its own causal mask; pass attention_mask=None"
            )
        hidden = self.hidden_positions(
            query.size(0),
            cp=self.cp_group.size(),
            rank=self.cp_group.rank(),
            num_earlier=self.num_earlier,
            device=query.device,
        )
        # Gathered before upstream repeats them for groups of queries. Backward sums what all ranks' queries ask for.
        keys = gather_from_sequence_parallel_region(key, group=self.cp_group)
        values = gather_from_sequence_parallel_region(value, group=self.cp_group)
        context: torch.Tensor = super().forward(query, keys, values, hidden, *args, **kwargs)
        return context


def hidden_positions(
    length: int, *, cp: int, rank: int, num_earlier: int | None, device: torch.device
) -> torch.Tensor:
    """Return (1, 1, length, length * cp), true where a query of `rank` must not see a key of all ranks in order.

    A rank holds `length` positions. A query sees itself and `num_earlier` keys before it, or all where that is None.
    """
    chunks = torch.arange(length * cp, device=device).tensor_split(2 * cp)
    ranks = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(cp)]
    queries, keys = ranks[rank][:, None], torch.cat(ranks)[None, :]
    hidden = keys > queries
    if num_earlier is not None:
        hidden |= keys < queries - num_earlier
    return hidden[None, None]
