"""Builds what one rank of a planned Megatron-core world holds, in a world that is not there, and follows a schedule.

Everything is built by the functions that training uses (network.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from strategies.fake_world import Ledger, create_state, fake_world, follow, optimizer_state, storage_bytes
from strategies.inspection import Inspection
from strategies.megatron import network
from strategies.megatron.settings import Settings, to_settings
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

_KERNELS = (
    "what fused kernels save beside attention's: norms, activations and the loss were counted as PyTorch's own "
    "operators keep them, which is more than Transformer Engine's do"
)
_BALANCED = "how unevenly tokens choose experts: each was given equally many"
# Every expert works on equally many tokens, so that no shape depends on a value.
_EQUAL_SHARES = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}


def inspect(
    plan: Plan,
    model: ModelSpec,
    training: TrainingSpec,
    *,
    rank: int,
    run_schedule: Callable[[list[Any], Plan], Any],
) -> Inspection:
    """Count the states of `rank`, and what `run_schedule` needs beside them for the chunks and the plan it is given."""
    extensions = network.prepare()
    settings = to_settings(plan, model, training, extensions=extensions)
    if model.moe:
        settings = replace(settings, transformer={**settings.transformer, **_EQUAL_SHARES})
    with fake_world(rank=rank, world_size=plan.world_size) as ledger, _stand_ins():
        network.join_groups(settings.parallel)
        try:
            built, found = _build(settings, model)
            few = replace(plan, num_microbatches=_enough(plan))
            peak, notes = _peak(ledger, plan, built, lambda: run_schedule(built, few))
        finally:
            network.leave_groups()
    if notes:
        return replace(found, notes=notes)
    notes = (_KERNELS, *((_BALANCED,) if model.moe else ()))
    return replace(found, working_bytes=peak - found.state_bytes, notes=notes)


def _enough(plan: Plan) -> int:
    """Micro-batches that tell what a schedule of more of them holds."""
    return min(plan.num_microbatches, 2 if plan.vp == 1 else 2 * plan.pp)


def _peak(
    ledger: Ledger, plan: Plan, chunks: Sequence[Any], run: Callable[[], None]
) -> tuple[int, tuple[str, ...]]:
    """Return the most bytes alive in a schedule, and a sentence where that could not be found out.

    What a stage keeps for one micro-batch it keeps for each that it holds at once: under 1F1B as many as there are
    stages from it to the end.
    """
    from megatron.core import parallel_state

    marks: list[int] = []
    hook = chunks[0].register_forward_pre_hook(lambda *_: marks.append(ledger.live_bytes))
    notes = follow(ledger, run)
    hook.remove()
    at_once = min(plan.num_microbatches, plan.pp - parallel_state.get_pipeline_model_parallel_rank())
    more = max(0, at_once - 2) if plan.vp == 1 and not notes else 0
    return ledger.peak_bytes + (more * (marks[1] - marks[0]) if more else 0), notes


def _build(settings: Settings, model: ModelSpec) -> tuple[list[Any], Inspection]:
    """Build chunks, buffers and optimizer with its state, and count them."""
    config = network.build_config(settings)
    chunks = network.build_chunks(settings, config, vocab_size=model.vocab_size)
    wrapped, optimizer = network.wrap(settings, config, chunks)
    weights = [parameter for chunk in wrapped for parameter in chunk.parameters()]
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weight_bytes = storage_bytes(weights)
    return wrapped, Inspection(
        parameters=sum(parameter.numel() for parameter in weights),
        weight_bytes=weight_bytes,
        gradient_bytes=storage_bytes(buffer.grad_data for buffer in buffers),
        # In fp32 the optimizer works on the weights themselves.
        optimizer_bytes=storage_bytes([*weights, *_kept_by(optimizer)]) - weight_bytes,
    )


def _kept_by(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters and the state of every optimizer of torch's inside Megatron-core's."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue  # this rank owns none of its shards
        create_state(part.optimizer)
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        yield from optimizer_state(part.optimizer)


class _Sent:
    """A message that has arrived."""

    def wait(self) -> None: ...


class _FusedAttention(torch.autograd.Function):  # type: ignore[misc]
    """Attention by what it keeps: inputs, result and one fp32 number a query and head (Dao 2023, algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Map (sequence, batch, heads, head size) to (sequence, batch, heads * value head size)."""
        length, batch, heads, _ = query.shape
        context = query.new_empty(length, batch, heads * value.size(-1))
        ctx.save_for_backward(query, key, value, context, query.new_empty(batch, heads, length).float())
        return context

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gradients of the shapes of the inputs."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    _attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    return _FusedAttention.apply(query, key, value)


class _Touched(torch.autograd.Function):  # type: ignore[misc]
    """Passes a result on, and gives weights that had no part in it a gradient all the same."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """Return `output`."""
        ctx.shapes = [weight.shape for weight in weights]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return gradients that take memory one by one, when they are added to the buffer."""
        return gradients[0], *(gradients[0].new_zeros(()).expand(shape) for shape in ctx.shapes)


def _run_as_one(
    experts: Any, tokens: torch.Tensor, _counts: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """Let one expert work on the tokens of all: as many bytes as a grouped product takes, and no need of counts."""
    first, *others = experts.local_experts
    output, _ = first(tokens, weights)
    return _Touched.apply(output, *(weight for expert in others for weight in expert.parameters())), None


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Attend and run experts as kernels of a GPU do, and let each bucket go alone: joined, they have no fake form."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe.experts import SequentialMLP

    with ExitStack() as stack:
        for target, name, replacement in (
            (DotProductAttention, "forward", _attend),
            (SequentialMLP, "forward", _run_as_one),
            (param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: nullcontext(_Sent())),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield
