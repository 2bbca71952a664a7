"""Counts what a DeepSpeed engine holds on one rank of a world that is not there. It imports torch; import it late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from strategies.fake_world import Ledger, follow, optimizer_state, storage_bytes
from strategies.inspection import Inspection

# Where ZeRO keeps gradients that it has reduced: stages 1 and 2, and stage 3 (stage_1_and_2.py, stage3.py).
_REDUCED = ("averaged_gradients", "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition")


@contextmanager
def agreeing_ranks() -> Iterator[None]:
    """Let ZeRO-3 believe that all ranks run the same layers; it would compare them by value."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    with mock.patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda *_, **__: None):
        yield


def sharded_building(config: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Cut each layer up as soon as it is built, where the configuration says ZeRO-3."""
    import deepspeed

    sharded = config["zero_optimization"]["stage"] == 3
    context: AbstractContextManager[Any] = deepspeed.zero.Init(
        config_dict_or_path=dict(config), enabled=sharded
    )
    return context


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
