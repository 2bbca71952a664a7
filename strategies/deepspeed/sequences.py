"""Sequence parallelism by Ulysses: each rank holds a part of every sequence, and in attention a part of the heads.

Jacobs et al. 2023 (arXiv 2309.14509), as ALST brings it to transformers' models. It imports DeepSpeed; import it late.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from strategies.spec import Plan, TrainingSpec


def split(network: Any, plan: Plan, training: TrainingSpec) -> Any:
    """Have `network` take its own part of the sequences it is given; return what DeepSpeed asks for its groups."""
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=network,
        core_attn_implementation=network.config._attn_implementation,
        sequence_parallel_size=plan.cp,
        micro_batch_size=plan.micro_batch_size,
        seq_length=training.sequence_length,
        seq_length_is_variable=False,
    )

    def take_part(
        _: Any, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = inputs["input_ids"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return args, {**inputs, "input_ids": part(tokens, plan), "position_ids": part(positions, plan)}

    network.register_forward_pre_hook(take_part, with_kwargs=True)
    return mpu


def count_as_data(engine: Any) -> None:
    """Let the bf16 optimizer take norms over data parallel ranks alone.

    It takes ranks of one sequence for tensor parallel ones (runtime/bf16_optimizer.py, get_norm_for_all_local_params),
    which hold different parameters.
    """
    engine.optimizer.mpu = None


def part(tokens: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return this rank's columns of (sequences, length)."""
    rank = plan.coordinate("cp", torch.distributed.get_rank())
    return tokens.chunk(plan.cp, dim=1)[rank].contiguous()


def restore_attention(network: Any) -> None:
    """Give transformers its own attention back."""
    ALL_ATTENTION_FUNCTIONS.pop(network.config._attn_implementation)
