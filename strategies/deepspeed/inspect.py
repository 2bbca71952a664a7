"""Counts what a DeepSpeed engine holds on one rank of a world that is not there. It imports torch; import it late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from strategies import hf
from strategies.deepspeed.network import Source
from strategies.fake_world import Ledger, follow, optimizer_state, storage_bytes
from strategies.inspection import Inspection
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

# Where ZeRO keeps gradients that it has reduced: stages 1 and 2, and stage 3 (stage_1_and_2.py, stage3.py).
_REDUCED = ("averaged_gradients", "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition")

# Tensor parallel ranks send parts of messages between stages, which are put together by values.
WHOLE_MESSAGES = {"pipe_partitioned": False, "grad_partitioned": False}


@contextmanager
def stand_ins(plan: Plan, training: TrainingSpec) -> Iterator[None]:
    """Answer for the other ranks where DeepSpeed asks for values."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    def receive_meta(engine: Any, _: int) -> torch.Tensor:
        shape = (plan.micro_batch_size, training.sequence_length, engine.module.network.config.hidden_size)
        return torch.empty(shape, dtype=engine.module.network.dtype)

    with ExitStack() as stack:
        for target, name, replacement in (
            # All ranks run the same layers, which ZeRO-3 would compare by value.
            (coordinator, "assert_ints_same_as_other_ranks", lambda *_, **__: None),
            (PipelineEngine, "_recv_tensor_meta", receive_meta),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def source_of(model: ModelSpec, plan: Plan, config: Mapping[str, Any]) -> Source:
    """Make models that have shapes and no weights; under ZeRO-3 each layer is cut up as soon as it is built."""
    import deepspeed

    def whole() -> Any:
        sharded = plan.zero_stage == 3 and plan.tp == 1
        with deepspeed.zero.Init(config_dict_or_path=dict(config)) if sharded else nullcontext():
            return hf.build_unfilled_model(model)

    def stage(keep: Callable[[Any], None]) -> Any:
        network = hf.build_unfilled_model(model)
        keep(network)
        return network

    return Source(whole=whole, stage=stage)


def inspect(ledger: Ledger, engine: Any, step: Callable[[], Any]) -> Inspection:
    """Step twice and count; the first step makes the optimizer's states."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    gradients = [0]

    def count(*_: Any) -> None:
        gradients.append(storage_bytes(_gradients(engine)))

    # Whole gradients are there until the last micro-batch is through, sharded ones until the optimizer has read them.
    engine.module.register_forward_hook(count)
    inner.register_step_pre_hook(count)
    notes = follow(ledger, step) or follow(ledger, step)
    weights = list(_weights(engine))
    found = Inspection(
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        weight_bytes=storage_bytes(weights),
        gradient_bytes=max(gradients),
        # Without ZeRO the optimizer works on the weights themselves.
        optimizer_bytes=storage_bytes([*weights, *_masters(engine), *optimizer_state(inner)])
        - storage_bytes(weights),
        notes=notes,
    )
    return found if notes else replace(found, working_bytes=ledger.peak_bytes - found.state_bytes)


def _weights(engine: Any) -> Iterator[torch.Tensor]:
    """Yield what the forward pass reads or gathers."""
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)


def _masters(engine: Any) -> Iterator[torch.Tensor]:
    """Yield the weights that the optimizer works on; stage 3 shows it one part of them at a time."""
    parts = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if parts is None:
        parts = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    yield from parts


def _gradients(engine: Any) -> Iterator[torch.Tensor]:
    """Yield what ZeRO has reduced; only where that is nothing, what lies at the parameters."""
    reduced = [
        gradient
        for name in _REDUCED
        for group in (getattr(engine.optimizer, name, None) or {}).values()
        for gradient in ([group] if isinstance(group, torch.Tensor) else group or [])
    ]
    owners = [] if reduced else [*engine.module.parameters(), *_masters(engine)]
    at_parameters = [g for owner in owners for g in (owner.grad, getattr(owner, "grad_accum", None))]
    yield from (gradient for gradient in (*reduced, *at_parameters) if gradient is not None)
