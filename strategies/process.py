"""What the adapters do to the one process they run in: its device, seeds, determinism, group, and means over ranks.

torch is imported inside the functions, so that the adapters can be read without it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from strategies.spec import TrainingSpec

if TYPE_CHECKING:
    import torch


def local_device() -> torch.device:
    """Return this process' GPU (by LOCAL_RANK) and make it current, or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def join_single_rank_group() -> None:
    """Open a group of one where the worker opened none: some engines ask for one, no network is needed.

    It stays open until the process ends, because engines remember their groups.
    """
    import torch
    import torch.distributed as dist

    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        # gloo alone would take the reductions of a GPU's gradients through host memory.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def seed_everything(training: TrainingSpec, *, rank: int) -> None:
    """Seed Python, NumPy and torch, each rank differently: dropout must not repeat across ranks."""
    import numpy as np
    import torch

    seed = training.seed * 1_000_003 + rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(training: TrainingSpec) -> None:
    """Trade speed for bit-equal repeats where `training.deterministic` asks for it; see also environment.py."""
    import torch

    if not training.deterministic:
        return
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def mean_of(losses: Sequence[torch.Tensor]) -> float:
    """Average the losses of this rank's micro-batches, and over the ranks."""
    return means_of(losses)[0]


def means_of(losses: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the mean over all ranks' micro-batches, and over this rank's own."""
    import torch

    own = torch.stack(list(losses)).mean()
    return mean_over_ranks(own), float(own)


def own_mean(losses: Sequence[torch.Tensor]) -> float | None:
    """Return the mean over this rank's micro-batches alone; None where it computes none, as before the last stage."""
    import torch

    return float(torch.stack(list(losses)).mean()) if losses else None


def mean_over_ranks(value: torch.Tensor) -> float:
    """Average a scalar over the process group, or return it where there is none."""
    import torch.distributed as dist

    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)
