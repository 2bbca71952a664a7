"""Reads and writes what ZeRO-Infinity keeps on a disk, where DeepSpeed's own operator was not compiled.

DeepSpeed's is C++ on libaio (ops/csrc/aio), which would be compiled at the first step, and libaio is seldom there. This
one is threads and the page cache, behind the same methods. It imports torch; import it late.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.swap_tensor import (
    partitioned_optimizer_swapper,
    partitioned_param_swapper,
    pipelined_optimizer_swapper,
)

_swap_in = partitioned_param_swapper.AsyncPartitionedParameterSwapper.swap_in
_USERS = (partitioned_optimizer_swapper, partitioned_param_swapper, pipelined_optimizer_swapper)


class Handle:
    """What DeepSpeed's `aio_handle` is to its swappers (runtime/swap_tensor)."""

    # Of all handles together: one swapper's buffers are handed to another one's handle.
    _locked: ClassVar[set[int]] = set()

    def __init__(self, *, intra_op_parallelism: int = 1, **unused: Any) -> None:
        self._threads = ThreadPoolExecutor(max(2, intra_op_parallelism))
        self._running: list[Future[None]] = []

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Begin to fill `buffer`."""
        return self._begin(_read, buffer, path, offset)

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Begin to write `buffer`."""
        return self._begin(_write, buffer, path, offset)

    def wait(self) -> int:
        """End what was begun; return how many transfers that were."""
        running, self._running = self._running, []
        for transfer in running:
            transfer.result()
        return len(running)

    def new_cpu_locked_tensor(self, numel: int, example: torch.Tensor) -> torch.Tensor:
        """Return a buffer for transfers."""
        buffer = torch.empty(numel, dtype=example.dtype, pin_memory=torch.cuda.is_available())
        self._locked.add(buffer.untyped_storage().data_ptr())
        return buffer

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> None:
        """Forget a buffer."""
        self._locked.discard(buffer.untyped_storage().data_ptr())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor lies in one of the buffers."""
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._locked

    def _begin(
        self, transfer: Callable[[memoryview, str, int], None], buffer: torch.Tensor, path: str, offset: int
    ) -> int:
        content = memoryview(buffer.detach().view(torch.uint8).numpy())
        self._running.append(self._threads.submit(transfer, content, path, offset))
        return 0


def enable() -> None:
    """Let DeepSpeed's swappers use `Handle`, unless their own operator was compiled at installation."""
    partitioned_param_swapper.AsyncPartitionedParameterSwapper.swap_in = _swap_in_once
    if installed_ops.get("async_io"):
        return
    operator = SimpleNamespace(aio_handle=Handle)
    for module in _USERS:
        module.AsyncIOBuilder = lambda: SimpleNamespace(load=lambda verbose=False: operator)


def _swap_in_once(self: Any, params: Sequence[Any], *args: Any, **options: Any) -> None:
    """Read each weight once: upstream's prefetch names those twice that the backward pass needs soon as well.

    It then fails in the swapper (partitioned_param_coordinator.py, __prefetch_nvme_param_partitions).
    """
    _swap_in(self, list(dict.fromkeys(params)), *args, **options)


def _read(content: memoryview, path: str, offset: int) -> None:
    with open(path, "rb", buffering=0) as file:
        while content and (count := os.preadv(file.fileno(), [content], offset)):
            content, offset = content[count:], offset + count
    if content:
        raise OSError(f"{path} ends {len(content)} bytes too early; something else writes to plan.nvme_path")


def _write(content: memoryview, path: str, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while content:
            count = os.pwrite(descriptor, content, offset)
            content, offset = content[count:], offset + count
    finally:
        os.close(descriptor)
