"""Who am I among the ranks, and the few things ranks do together. The only torch in launcher/."""

from __future__ import annotations

import base64
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from launcher.errors import ClusterError
from strategies.spec import BESIDE

Store: TypeAlias = dist.Store
# Long for start-up: compilation, weights from a slow disk, ranks that arrive late.
INIT_TIMEOUT = timedelta(minutes=30)
# Ranks that write checkpoints meet when the slowest disk is done.
WRITE_TIMEOUT = timedelta(hours=2)
RUN_DIR_KEY = "meshwright/run_dir"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `world_size`; with one rank no process group exists and every call is local."""

    rank: int
    world_size: int
    local_rank: int
    group: dist.ProcessGroup | None = None  # None: training's own

    def separate(self) -> Ranks:
        """The same ranks over a group of its own, for another thread; every rank has to ask."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT, group_desc=BESIDE)
        return replace(self, group=group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def any(self, flag: bool) -> bool:
        """Tell whether any rank says yes; all ranks get the same answer."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return bool(value.item())

    def maximum(self, value: float) -> float:
        """Largest value over all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return float(tensor.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def share_run_dir(run_dir: str | None) -> tuple[str, Store]:
    """Hand rank 0's run directory to the ranks that were started without one (bare torchrun).

    Returns the store as well: rank 0 may be its server, so it has to outlive the process group.
    """
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=INIT_TIMEOUT)))
    if rank == 0:
        assert run_dir is not None
        store.set(RUN_DIR_KEY, run_dir)
        return run_dir, store
    return str(store.get(RUN_DIR_KEY).decode()), store


def connect(environment: Mapping[str, str], *, on_device: bool, store: Store | None = None) -> Ranks:
    """Read torchrun's variables and, with more than one rank, open the process group every engine uses."""
    ranks = Ranks(
        rank=int(environment.get("RANK", "0")),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
    )
    if on_device:
        take_device(ranks.local_rank)
    else:
        # The plan is for processors: neither we nor an engine may see a GPU that is here.
        os.environ.update({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    if ranks.world_size > 1:
        # CPU tensors go through gloo, so that a stop flag never waits for a GPU stream.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_device else "gloo",
            timeout=INIT_TIMEOUT,
            store=store,
            # torch reads these two from the environment itself, but not beside a store.
            rank=ranks.rank if store is not None else -1,
            world_size=ranks.world_size if store is not None else -1,
        )
    return ranks


def take_device(local_rank: int) -> None:
    """Make the GPU of this number ours; raise ClusterError where there is none."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= available:
        raise ClusterError(
            f"local rank {local_rank} needs a GPU of its own and this host shows {available}; "
            "start fewer ranks, or use cluster=local"
        )
    torch.cuda.set_device(local_rank)


def disconnect() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_peak_bytes() -> Callable[[], int] | None:
    """Who tells the peak bytes that tensors took on this rank's GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated if torch.cuda.is_available() else None


def device_memory() -> Callable[[], tuple[int, int]] | None:
    """Who tells the bytes in tensors and those held by the allocator on this rank's GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return lambda: (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())


def pulse_s() -> float:
    """Time a fixed matrix product on this rank's device: a slow rank is slow at it too, whatever the engine does."""
    on_device = torch.cuda.is_available()
    size, kind = (2048, torch.bfloat16) if on_device else (256, torch.float32)
    factor = torch.full((size, size), 0.5, dtype=kind, device="cuda" if on_device else "cpu")
    started = 0.0
    for number in range(4):
        if on_device:
            torch.cuda.synchronize()
        if number == 1:  # the one before warms up
            started = time.perf_counter()
        factor @ factor
    if on_device:
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Profiler:
    """PyTorch's profiler over some steps of this rank: operators, kernels, collectives."""

    def __init__(self) -> None:
        # Kineto tells the terminal of each start and stop, whatever its level; above all of them it is quiet.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        kinds = torch.profiler.ProfilerActivity
        self._on_device = torch.cuda.is_available()
        on_device = [kinds.CUDA] if self._on_device else []
        self._profile = torch.profiler.profile(activities=[kinds.CPU, *on_device])
        self._started_ns = 0

    def start(self) -> None:
        """Begin to record."""
        self._started_ns = time.time_ns()
        self._profile.start()

    def mark(self, name: str) -> AbstractContextManager[Any]:
        """Name a stretch of the trace."""
        found: AbstractContextManager[Any] = torch.profiler.record_function(name)
        return found

    def stop(self, path: Path) -> None:
        """Stop, and write the trace in Chrome's format, which Perfetto reads as well."""
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))

    def collectives(self) -> list[tuple[str, str]]:
        """Return event and group of what gloo was asked for since the start, in order.

        NCCL's kernels know their groups, gloo's events do not (torch 2.13),
        but PyTorch's flight recorder does. It keeps the newest 2000 (TORCH_FR_BUFFER_SIZE).
        """
        dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_fr_trace_json", None)
        if self._on_device or dump is None:  # an older PyTorch
            return []
        entries = json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
        meanwhile = (entry for entry in entries if entry["time_created_ns"] >= self._started_ns)
        return [(entry["profiling_name"], entry["process_group"][0]) for entry in meanwhile]


def device_error() -> type[BaseException]:
    """The exception class that an engine raises when GPU memory runs out."""
    error: type[BaseException] = torch.cuda.OutOfMemoryError
    return error


def random_state() -> dict[str, Any]:
    """State of every random number generator of this process, as plain JSON."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()},
        },
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    inner = state["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})
    torch.set_rng_state(_to_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_to_tensor(state["cuda"]))


def _to_text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
