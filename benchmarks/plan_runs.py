"""Runs plans through the Strategy interface and times their steps: one rank, many plans in one process group.

Started as: python -m benchmarks.plan_runs REQUEST.json; `run` below starts one for each rank.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

import strategies
from benchmarks.record import REPOSITORY
from launcher import planner
from launcher.cluster import detect
from launcher.cluster.spec import ClusterSpec
from launcher.decode import decode, encode
from launcher.planner import PlanRequest
from launcher.planner.cost import CostBreakdown
from launcher.submit import local
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

if TYPE_CHECKING:
    from launcher.ranks import Ranks

MODULE = "benchmarks.plan_runs"
_DISTURBED = 0.1  # share of the processors that others use beside a step that is measured again
_CLOCK_S = 0.02  # the system counts in hundredths of a second
_PATIENCE = 4  # times as many steps at most
_PINNED = ("dp", "tp", "pp", "cp", "zero_stage", "micro_batch_size", "num_microbatches", "recompute")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and how it is trained."""

    model: ModelSpec
    training: TrainingSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan of one shape."""

    shape: str
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Steps of each plan: some to warm up, then those that count."""

    num_steps: int
    warmup: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of every step after warm-up, and the peak bytes of the device (0 on a CPU)."""

    step_s: tuple[float, ...]
    peak_bytes: int

    @property
    def median_s(self) -> float:
        """The middle step."""
        return statistics.median(self.step_s)


def legal(shape: Shape, *, name: str, strategy: str, world_size: int) -> Iterator[Case]:
    """Every data parallel plan of one engine: ZeRO stages, micro-batches, recomputation."""
    capabilities = strategies.load(strategy).capabilities
    per_rank = shape.training.global_batch_size // world_size
    for stage in sorted(capabilities.zero_stages):
        for size in (value for value in range(1, per_rank + 1) if per_rank % value == 0):
            for recompute in ("none", "full"):
                plan = Plan(
                    strategy=strategy,
                    dp=world_size,
                    zero_stage=stage,
                    micro_batch_size=size,
                    num_microbatches=per_rank // size,
                    recompute=recompute,
                    precision=shape.training.precision,
                    rank_order=capabilities.rank_order,
                )
                if capabilities.why_not(plan) is None:
                    yield Case(shape=name, plan=plan)


def predict(shape: Shape, plan: Plan, cluster: ClusterSpec) -> CostBreakdown:
    """Ask the planner about exactly this plan on as many ranks as it has."""
    request = PlanRequest(**{key: getattr(plan, key) for key in _PINNED})
    here = replace(cluster, num_nodes=1, gpus_per_node=plan.world_size)
    training = replace(shape.training, precision=plan.precision)
    ranking = planner.rank(shape.model, here, training, request, strategies=[plan.strategy])
    cost = ranking.choose().cost
    assert cost is not None, "a chosen plan was costed"
    return cost


def run(
    shapes: dict[str, Shape], cases: Sequence[Case], *, effort: Effort, device: str, timeout_s: float
) -> list[Measured]:
    """Measure `cases`, all of one world size, in one start and in this order."""
    num_processes = cases[0].plan.world_size
    assert all(case.plan.world_size == num_processes for case in cases), "one start has one world size"
    with tempfile.TemporaryDirectory() as folder:
        request, results = Path(folder) / "request.json", Path(folder) / "results.json"
        content = {
            "shapes": encode(shapes),
            "cases": encode(list(cases)),
            "effort": encode(effort),
            "device": device,
            "folder": folder,
            "results": str(results),
        }
        request.write_text(json.dumps(content), encoding="utf-8")
        command = local.argv(run_dir=request, num_processes=num_processes, port=None, module=MODULE)
        environment = local.environment(
            os.environ, num_processes=num_processes, num_cores=detect.count_cores()
        )
        done = subprocess.run(
            command,
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        rows = json.loads(results.read_text(encoding="utf-8"))
    return [decode(Measured, row) for row in rows]


# ---- one rank -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    from launcher import ranks as torch_side

    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    shapes = {name: decode(Shape, shape) for name, shape in request["shapes"].items()}
    cases = [decode(Case, case) for case in request["cases"]]
    effort = decode(Effort, request["effort"])
    ranks = torch_side.connect(os.environ, on_device=request["device"] == "cuda")
    folder = Path(request["folder"])
    rows = []
    for case in cases:
        shape, weights = shapes[case.shape], folder / case.shape
        if ranks.rank == 0:
            strategies.load(case.plan.strategy).create_weights(shape.model, shape.training, weights)
        ranks.barrier()
        times, peak = _measure(case.plan, shape, weights, effort=effort, ranks=ranks)
        rows.append({"step_s": times, "peak_bytes": int(ranks.maximum(float(peak)))})
    if ranks.rank == 0:
        Path(request["results"]).write_text(json.dumps(rows), encoding="utf-8")
    ranks.barrier()
    torch_side.disconnect()


def _measure(
    plan: Plan, shape: Shape, weights: Path, *, effort: Effort, ranks: Ranks
) -> tuple[list[float], int]:
    import torch

    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training = replace(shape.training, precision=plan.precision)
    strategy = strategies.load(plan.strategy)()
    strategy.setup(plan, shape.model, training, weights)
    generator = np.random.default_rng(strategy.dp_rank)
    size = (plan.micro_batch_size, training.sequence_length + 1)

    def step() -> float:
        batches = [
            generator.integers(0, shape.model.vocab_size, size=size, dtype=np.int64)
            for _ in range(plan.num_microbatches)
        ]
        started = time.perf_counter()
        strategy.train_step(batches, learning_rate=1e-4)  # its loss is a number, so the device is done
        return time.perf_counter() - started

    for _ in range(effort.warmup):
        step()
    times = (
        [step() for _ in range(effort.num_steps)]
        if on_device
        else _undisturbed(step, ranks, effort.num_steps)
    )
    strategy.teardown()
    return times, torch.cuda.max_memory_allocated() if on_device else 0


def _undisturbed(step: Callable[[], float], ranks: Ranks, count: int) -> list[float]:
    """The `count` steps beside which others used the processors least, out of as many more as it takes, to a limit."""
    found: list[tuple[float, float]] = []
    while sum(others <= _DISTURBED for others, _ in found) < count and len(found) < _PATIENCE * count:
        busy, own, started = _busy_s(), time.process_time(), time.perf_counter()
        seconds = step()
        elapsed = time.perf_counter() - started
        used = sum(ranks.gather(time.process_time() - own))
        others = ranks.maximum((_busy_s() - busy - used - _CLOCK_S) / elapsed / detect.count_cores())
        found.append((others, seconds))
    return [seconds for _, seconds in sorted(found)[:count]]


def _busy_s() -> float:
    """Seconds that all processors together were not idle since the start of the machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # destructors of a process group may wait for ranks that are gone
