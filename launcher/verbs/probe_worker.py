"""One rank of `meshwright probe`: times products, attention, copies, launches and collectives on this device.

Started as `python -m launcher.verbs.probe_worker REQUEST.json`; rank 0 writes what was measured into the file it names.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from launcher import ranks as torch_side
from launcher.errors import LauncherError
from launcher.ranks import Ranks

FAULT = "probe fault: "  # before the one sentence that the launcher repeats
_BATCHES = 5  # of calls; the median counts: ranks that share a core are lucky now and then
_BATCH_S = 0.04  # long enough for ranks that share a core to have their turns
_HEADS, _HEAD_SIZE = 8, 64
_TINY = 32  # hidden size of layers that cost nothing but the host's time
_TINY_LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Ladders of one kind of device."""

    products: tuple[tuple[int, int, int], ...]  # rows, columns, inner
    sequences: tuple[int, ...]
    copied_bytes: int
    messages: tuple[int, ...]  # bytes


SIZES = {
    "cpu": Sizes(
        products=(
            *((size, size, size) for size in (64, 128, 256, 512, 1024)),
            *((1024, 192, 192), (256, 1024, 256), (2048, 512, 64)),
        ),
        sequences=(64, 256, 1024),
        copied_bytes=2**26,
        messages=(2**10, 2**14, 2**18, 2**21, 2**24),
    ),
    "cuda": Sizes(
        products=(
            *((size, size, size) for size in (256, 512, 1024, 2048, 4096, 8192)),
            *((8192, 1024, 1024), (4096, 4096, 1024), (8192, 8192, 512)),
        ),
        sequences=(512, 2048, 8192),
        copied_bytes=2**30,
        messages=(2**12, 2**16, 2**20, 2**24, 2**28),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A device among ranks that measure together until `deadline` on the monotonic clock."""

    ranks: Ranks
    device: torch.device
    sizes: Sizes
    deadline: float

    def seconds(self, work: Callable[[], Any]) -> float | None:
        """Median seconds of one call on the slowest rank, all ranks at once; None when the time is up."""
        if self.ranks.any(time.monotonic() > self.deadline):
            return None
        self._timed(work, 1)  # caches, workspaces, connections
        first = self.ranks.maximum(self._timed(work, 1))
        calls = max(1, min(2000, int(_BATCH_S / first)))
        self.ranks.barrier()
        batches = sorted(self._timed(work, calls) for _ in range(_BATCHES))
        return self.ranks.maximum(batches[_BATCHES // 2] / calls)

    def _timed(self, work: Callable[[], Any], calls: int) -> float:
        self._synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A random tensor on the device."""
        return torch.rand(*shape, device=self.device).to(dtype)


def main(arguments: list[str]) -> int:
    """Measure with the other ranks; return the exit code."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    started = time.monotonic()
    # Collectives have newer names in some releases and only the older ones in others.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        ranks = torch_side.connect(os.environ, on_device=request["device"] == "cuda")
        bench = Bench(
            ranks=ranks,
            device=torch.device(request["device"]),
            sizes=SIZES[request["device"]],
            deadline=started + request["seconds"],
        )
        measured = measure(bench, tiers=request["tiers"])
        if ranks.rank == 0:
            Path(request["results"]).write_text(json.dumps(measured), encoding="utf-8")
        ranks.barrier()
        torch_side.disconnect()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        print(
            f"{FAULT}{'' if isinstance(error, LauncherError) else type(error).__name__ + ': '}{lines[0]}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def measure(bench: Bench, *, tiers: list[int]) -> dict[str, Any]:
    """Everything, the cheapest first; what no time was left for is absent."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "memory": list(_memory(bench)),
        "host": _host(bench),
        "products": [],
        "attention": [],
        "collectives": [],
    }
    for precision, dtype in _precisions(bench.device):
        found["products"] += _products(bench, precision, dtype)
    # Attention is not run in fp32 where 16 bits are at home.
    precision, dtype = list(_precisions(bench.device))[0 if bench.device.type == "cpu" else 1]
    found["attention"] = list(_attention(bench, precision, dtype))
    if bench.ranks.world_size > 1:
        for position, size in enumerate(tiers):
            inner = tiers[position - 1] if position else 1
            found["collectives"] += _collectives(bench, tier=position, inner=inner, outer=size)
        found["overlap"] = _overlap(bench)
    return found


def _precisions(device: torch.device) -> Iterator[tuple[str, torch.dtype]]:
    yield "fp32", torch.float32
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        yield "bf16", torch.bfloat16
    if device.type == "cuda":
        yield "fp16", torch.float16
        if torch.cuda.get_device_capability() >= (8, 9):
            yield "fp8", torch.float8_e4m3fn


def _products(bench: Bench, precision: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for rows, columns, inner in bench.sizes.products:
        left, right = bench.tensor(rows, inner, dtype=dtype), bench.tensor(columns, inner, dtype=dtype)
        work = _narrow_product(left, right) if precision == "fp8" else _product(left, right)
        seconds = bench.seconds(work)
        if seconds is not None:
            yield {"precision": precision, "m": rows, "n": columns, "k": inner, "s": seconds}


def _product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], Any]:
    return lambda: functional.linear(left, right)


def _narrow_product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], Any]:
    scale = torch.ones((), device=left.device)
    return lambda: torch._scaled_mm(left, right.t(), scale, scale, out_dtype=torch.bfloat16)


def _attention(bench: Bench, precision: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for length in bench.sizes.sequences:
        shape = (1, _HEADS, length, _HEAD_SIZE)
        query, key, value = (bench.tensor(*shape, dtype=dtype).requires_grad_() for _ in range(3))
        forward = _causal(query, key, value)
        once, twice = (
            bench.seconds(forward),
            bench.seconds(_and_backward(forward, bench.tensor(*shape, dtype=dtype))),
        )
        if once is not None and twice is not None:
            flops = 2 * length * length * _HEADS * _HEAD_SIZE  # both products, half of them masked
            row = {"precision": precision, "length": length, "heads": _HEADS, "head_size": _HEAD_SIZE}
            yield {**row, "flops": flops, "forward_s": once, "backward_s": max(twice - once, once / 10)}


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _and_backward(forward: Callable[[], torch.Tensor], gradient: torch.Tensor) -> Callable[[], Any]:
    return lambda: forward().backward(gradient)


def _memory(bench: Bench) -> Iterator[dict[str, Any]]:
    """A copy into memory that is there, and an element-wise kernel as engines run it, into memory that is not."""
    source = bench.tensor(bench.sizes.copied_bytes // 4)
    target = torch.empty_like(source)
    small = source[: source.numel() // 16]
    for name, work, tensor in (
        ("copy", lambda: target.copy_(source), source),
        ("elementwise", lambda: small * 1.5, small),
    ):
        seconds = bench.seconds(work)
        if seconds is not None:
            yield {"name": name, "bytes": 2 * 4 * tensor.numel(), "s": seconds}


def _host(bench: Bench) -> dict[str, float]:
    """Seconds of tiny layers, forward and backward: whole, and each of them and their root a unit of FSDP2."""
    found: dict[str, float] = {"layers": _TINY_LAYERS}
    for name, sharded in (("whole_s", False), ("sharded_s", True)):
        if sharded and bench.ranks.world_size == 1:
            continue
        layers = torch.nn.Sequential(*(_Layer() for _ in range(_TINY_LAYERS))).to(bench.device)
        if sharded:
            mesh = init_device_mesh(bench.device.type, (bench.ranks.world_size,))
            for layer in (*layers, layers):
                fully_shard(layer, mesh=mesh)
        seconds = bench.seconds(_training(layers, bench.tensor(1, 8, _TINY)))
        if seconds is not None:
            found[name] = seconds
    return found


def _training(layers: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], Any]:
    return lambda: layers(inputs).sum().backward()


class _Norm(torch.nn.Module):  # type: ignore[misc]
    """RMSNorm in torch's own operators, as Hugging Face writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(_TINY))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(hidden.dtype)


class _Layer(torch.nn.Module):  # type: ignore[misc]
    """A decoder layer with the operators of an eager one, too small to be work."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(_Norm() for _ in range(2))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(_TINY, _TINY, bias=False) for _ in range(4))
        self.feed = torch.nn.ModuleList(torch.nn.Linear(_TINY, _TINY, bias=False) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden.shape
        normed = self.norms[0](hidden)
        query, key, value = (
            linear(normed).view(batch, length, 2, -1).transpose(1, 2) for linear in list(self.heads)[:3]
        )
        attended = functional.scaled_dot_product_attention(
            _rotate(query), _rotate(key), value, is_causal=True
        )
        hidden = hidden + self.heads[3](attended.transpose(1, 2).reshape(batch, length, -1))
        normed = self.norms[1](hidden)
        gate, up, down = self.feed
        return hidden + down(functional.silu(gate(normed)) * up(normed))


def _rotate(heads: torch.Tensor) -> torch.Tensor:
    """The kernels of a rotary embedding."""
    first, second = heads.chunk(2, dim=-1)
    return heads * 0.6 + torch.cat((-second, first), dim=-1) * 0.8


def _overlap(bench: Bench) -> dict[str, float] | None:
    """An all-reduce and a product that take about as long as each other, apart and together."""
    message = bench.tensor(bench.sizes.messages[-2] // 4)
    left = bench.tensor(*bench.sizes.products[3][:2])
    sent_s = bench.seconds(lambda: dist.all_reduce(message))
    product_s = bench.seconds(lambda: left @ left)
    if sent_s is None or product_s is None:
        return None
    calls = max(1, round(sent_s / product_s))

    def together() -> None:
        pending = dist.all_reduce(message, async_op=True)
        for _ in range(calls):
            left @ left
        pending.wait()

    both_s = bench.seconds(together)
    return None if both_s is None else {"sent_s": sent_s, "computed_s": calls * product_s, "both_s": both_s}


# ---- collectives --------------------------------------------------------------------------------------------------


def _collectives(bench: Bench, *, tier: int, inner: int, outer: int) -> Iterator[dict[str, Any]]:
    """Groups that cross this tier only: every `inner`-th rank of `outer` neighbours; all groups at once."""
    ranks, mine = bench.ranks, None
    for members in groups(ranks.world_size, inner=inner, outer=outer):
        group = dist.new_group(members)  # every rank has to open every group
        if ranks.rank in members:
            mine = (group, members)
    assert mine is not None, "every rank is in one group of a tier"
    group, members = mine
    if ranks.any(len(members) < 2):
        return
    for size in bench.sizes.messages:
        for name, work in _operations(bench, group, members, size).items():
            seconds = bench.seconds(work)
            if seconds is not None:
                yield {"tier": tier, "name": name, "size": len(members), "bytes": size, "s": seconds}


def groups(world_size: int, *, inner: int, outer: int) -> list[list[int]]:
    """Ranks of each group: in every `outer` neighbours, those that stand alike in their `inner` neighbours."""
    return [
        list(range(start, min(first + outer, world_size), inner))
        for first in range(0, world_size, outer)
        for start in range(first, min(first + inner, world_size))
    ]


def _operations(
    bench: Bench, group: dist.ProcessGroup, members: list[int], size: int
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; `size` is bytes of the whole buffer on one rank."""
    part = bench.tensor(max(1, size // 4 // len(members)))
    whole = part.repeat(len(members))
    place = members.index(bench.ranks.rank)
    # Neighbours talk in pairs, forth and back; the odd one out waits.
    partner = members[place ^ 1] if place ^ 1 < len(members) else None

    def exchange() -> None:
        if partner is None:
            return
        calls = (dist.send, dist.recv) if place % 2 == 0 else (dist.recv, dist.send)
        for call in calls:
            call(whole, partner, group=group)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "exchange": exchange,
    }


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a process group may wait for ranks that are gone
