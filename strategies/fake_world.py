"""A world that is not there: one process is any rank of it, tensors have shapes and no memory, messages go nowhere.

    with fake_world(rank=8, world_size=64) as ledger:
        ...                       # an engine's own set-up and steps
        ledger.peak_bytes         # of all that was alive at once

Import it inside functions only: it imports torch.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies.inspection import Inspection
from strategies.spec import Plan, TrainingSpec

# What a step raises when it depends on values, which nothing here has: the engine is not to blame.
NEEDS_VALUES: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


class Ledger(TorchDispatchMode):  # type: ignore[misc]
    """Follows the bytes of every storage that is made while it is on, until it dies; and answers for values."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def restart(self) -> None:
        """Forget the peak so far; what only a cycle of references keeps is freed first."""
        gc.collect()
        self.peak_bytes = self.live_bytes

    def resized(self, storage: Any, size: int) -> None:
        """Take note that a storage that is known has become `size` bytes large (FSDP2 empties and refills its own)."""
        known = self._sizes.get(storage)
        if known is not None:
            self._add(size - known[0])
            known[0] = size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own parts come by on their own
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_value(args[0]):
            # Norms and losses are one, and nothing overflowed.
            return 1.0 if args[0].dtype.is_floating_point else 0
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return output

    def _follow(self, storage: Any) -> None:
        if storage in self._sizes:
            return
        self._sizes[storage] = size = [storage.nbytes()]
        self._add(size[0])
        weakref.finalize(storage, lambda: self._add(-size[0]))

    def _add(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@contextmanager
def fake_world(*, rank: int, world_size: int) -> Iterator[Ledger]:
    """Be `rank` of a world of fakes; leaves no process group behind."""
    ledger = Ledger()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, _variables(rank, world_size)))
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("cpu", (world_size,))  # looks for values, and so before tensors have none
        for target, name, replacement in _replacements(ledger, mesh):
            stack.enter_context(mock.patch.object(target, name, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        yield ledger


def measure(
    ledger: Ledger,
    *,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    gathered: bool,
) -> Inspection:
    """Count what is held, and follow one step.

    With `gathered` the weights are those that `network` reads in its forward pass, and the optimizer's parameters are
    counted as its state; otherwise both are the same tensors.
    """
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    counted = {"weights": storage_bytes(network.parameters()), "gradients": 0}

    def count_gradients(*_: Any) -> None:
        counted["gradients"] = storage_bytes(p.grad for p in owned if p.grad is not None)

    def count_weights(*_: Any) -> None:
        counted["weights"] = storage_bytes(network.parameters())

    optimizer.register_step_pre_hook(count_gradients)
    create_state(optimizer)
    if gathered:
        network.register_forward_hook(count_weights)
    notes = follow(ledger, step)
    found = Inspection(
        parameters=sum(parameter.numel() for parameter in owned),
        weight_bytes=counted["weights"],
        gradient_bytes=counted["gradients"],
        optimizer_bytes=storage_bytes([*optimizer_state(optimizer), *(owned if gathered else ())]),
        notes=notes,
    )
    return found if notes else replace(found, working_bytes=ledger.peak_bytes - found.state_bytes)


def follow(ledger: Ledger, step: Callable[[], Any]) -> tuple[str, ...]:
    """Run `step` from a new peak; return a sentence where it depends on values and so cannot be followed."""
    ledger.restart()
    try:
        step()
    except NEEDS_VALUES as error:
        return (f"what a step needs beside the states: the engine asks for values ({_first_line(error)})",)
    return ()


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make the state that its first step makes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def empty_batches(plan: Plan, training: TrainingSpec) -> list[NDArray[np.int64]]:
    """Return the micro-batches of one step, all zeros."""
    shape = (plan.micro_batch_size, training.sequence_length + 1)
    return [np.zeros(shape, dtype=np.int64)] * plan.num_microbatches


def leave_unsent(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Stand in for DDP's reduction of one bucket."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes behind tensors: what several share once, of a DTensor this rank's part."""
    storages = [_local(tensor).untyped_storage() for tensor in tensors]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield every tensor that an optimizer keeps for its parameters."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _has_no_value(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local


def _variables(rank: int, world_size: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    # The address is never used. Accelerate would write cpu:0, which is not the cpu of fake tensors.
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    return {**{name: str(value) for name, value in names.items()}, **fixed}


def _replacements(ledger: Ledger, mesh: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield (object, attribute, replacement) for what asks for memory or for an answer from another rank."""
    from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp
    from torch.nn.parallel import distributed as ddp

    yield torch.UntypedStorage, "resize_", _resize(ledger, torch.UntypedStorage.resize_)
    yield torch.nn.Module, "_apply", _apply
    # There is no address; as a name for a storage its identity serves as well.
    yield FakeTensor, "data_ptr", lambda tensor: id(tensor.untyped_storage())
    yield fsdp, "_init_default_mesh", lambda *_: mesh
    # All ranks hold the same shapes, and there are no values to bring into line.
    yield ddp, "_verify_param_shape_across_processes", lambda *_: True
    yield ddp, "_sync_module_states", lambda *_, **__: None
    # Dropout's places are not drawn, so that there is no state to go back to.
    yield torch, "get_rng_state", lambda: torch.empty(0)
    yield torch, "set_rng_state", lambda _: None
    # No bytes arrive, so that what was to be unpickled would be noise; every rank answers as this one does.
    yield dist, "all_gather_object", _all_gather_object


def _resize(ledger: Ledger, resize: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    def follow(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        ledger.resized(storage, size)
        return result

    return follow


def _apply(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Module._apply, which swaps fake parameters and fails where something remembers them; this sets their data."""
    if recurse:
        for child in module.children():
            _apply(child, fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = fn(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _all_gather_object(objects: list[Any], value: Any, group: Any = None) -> None:
    objects[:] = [value] * len(objects)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
