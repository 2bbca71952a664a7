"""Tensor parallelism: AutoTP cuts the layers, its vocabulary parallel classes token table and head.

AutoTP is applied here rather than by `deepspeed.initialize`, which would forget the pipeline and the data parallel
groups beside it (runtime/engine.py, _configure_tensor_parallel_states). It imports DeepSpeed; import it late.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.module_inject import set_autotp_mode
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig
from deepspeed.module_inject.layers import VocabParallelEmbedding, VocabParallelLinear
from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy


def shard(network: torch.nn.Module, words: Mapping[str, Any], group: Any) -> None:
    """Keep this rank's part of what `words` name (`settings.partition_words`), and of the vocabulary."""
    set_autotp_mode(training=True)
    auto = AutoTP(
        module=network,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(torch.nn.Linear, torch.nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig.from_dict(dict(words)),
        model_config=network.config,
        training_mode=True,
    )
    auto.mp_group, auto.mp_size = group, torch.distributed.get_world_size(group)
    _shard_vocabulary(network, auto)
    auto.update_linear_policies()
    auto._replace_module(network)
    auto.register_replicated_grad_hooks(network)


def _shard_vocabulary(network: Any, auto: AutoTP) -> None:
    """Cut token table and head by rows; where they are tied they stay one tensor."""
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = table is not None and head is not None and table.weight is head.weight
    options = {"mp_group": auto.mp_group, "tp_meta": auto.tp_meta}
    if head is not None:
        head = VocabParallelLinear(head, name="lm_head", **options)
        head.replaced = True  # AutoTP leaves it alone
        network.set_output_embeddings(head)
    if table is not None:
        table = VocabParallelEmbedding(
            table, tied_vocab_parallel_linear=head if tied else None, name="lm_head", **options
        )
        table.replaced = True
        network.set_input_embeddings(table)


def loss(logits: torch.Tensor, labels: torch.Tensor, head: VocabParallelLinear) -> torch.Tensor:
    """Mean cross-entropy over all tokens, in fp32, nats; `logits` are those of this rank's part of the vocabulary."""
    value: torch.Tensor = vocab_parallel_cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        tp_group=head.mp_group,
        vocab_start_index=head.vocab_start_index,
        vocab_end_index=head.vocab_end_index,
        global_vocab_size=head.vocab_size,
    )
    return value
