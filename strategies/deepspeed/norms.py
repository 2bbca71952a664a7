"""The norm of all gradients, over stages and parts, and clipping by it: without ZeRO, DeepSpeed's own is wrong.

`runtime/utils.py`, clip_grad_norm_, counts replicated parameters only on the first rank of stages and parts together,
so that of a pipeline only the first stage counts; and the norm of experts it averages over ranks that hold different
ones. It imports DeepSpeed; import it late.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter


def clip_without_zero(engine: Any, grid: Any | None) -> None:
    """Let `engine` clip by the norm over all ranks, and remember it as ZeRO does."""
    step = engine._take_model_step

    def measured_step(*args: Any, **options: Any) -> None:
        engine._global_grad_norm = total_norm(engine, grid)
        step(*args, **options)

    def clip() -> None:
        weights = list(engine.module.parameters())
        torch.nn.utils.clip_grads_with_norm_(weights, engine.gradient_clipping(), engine._global_grad_norm)

    engine._take_model_step, engine.clip_fp32_gradients = measured_step, clip


def total_norm(engine: Any, grid: Any | None) -> torch.Tensor:
    """Return the L2 norm of the gradients of the whole model; every rank of a model calls it."""
    shared: list[torch.Tensor] = []
    parted: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for parameter in engine.module.parameters():
        if parameter.grad is None or getattr(parameter, "ds_pipe_replicated", False):
            continue
        kind = (
            experts
            if is_moe_param(parameter)
            else parted
            if is_model_parallel_parameter(parameter)
            else shared
        )
        kind.append(parameter.grad)
    total = _square(engine, parted)
    if grid is None or grid.get_slice_parallel_rank() == 0:
        total = total + _square(engine, shared)
    if grid is not None:
        dist.all_reduce(total, group=grid.get_model_parallel_group())
    if experts:
        total_of_experts = _square(engine, experts)
        [group] = engine.expert_parallel_group.values()
        dist.all_reduce(total_of_experts, group=group)
        total = total + total_of_experts
    return total.sqrt()


def _square(engine: Any, gradients: list[torch.Tensor]) -> torch.Tensor:
    if not gradients:
        return torch.zeros((), device=engine.device)
    return torch.nn.utils.get_total_norm(gradients) ** 2
