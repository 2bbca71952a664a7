"""One rank of the parity suite: trains every plan of a JSON file, one after the other, and writes what rank 0 saw.

Started by conftest.py: python -m torch.distributed.run ... parity_worker.py CASES.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import strategies
from launcher.decode import decode
from strategies.base import Strategy
from strategies.bins import BORDERS, added
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    results = {name: run(case, job) for name, case in job["cases"].items()}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Engines leave threads behind whose order of ending is not ours.
    os._exit(0)


def run(case: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    training, plan = TrainingSpec(**job["training"]), decode(Plan, case["plan"])
    data = np.load(job["data"])
    strategy = strategies.load(plan.strategy)()
    with sabotaged(case.get("sabotage", {})):
        strategy.setup(plan, decode(ModelSpec, job["model"]), training, Path(job["weights"]))
    if case["load"]:
        strategy.load(Path(case["load"]))
    losses, norms, own = [], [], []
    write: Callable[[], None] | None = None
    for step in range(case["first"], case["last"]):
        rate = training.learning_rate_at(step)
        share = own_share(data[step], plan, strategy.dp_rank)
        if step == case["first"]:
            with strategy.counting_experts() as counted, strategy.taking_histograms() as taken:
                result = strategy.train_step(share, learning_rate=rate)
        else:
            result = strategy.train_step(share, learning_rate=rate)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        own.append(result.rank_loss)
        finish(write)  # a step later: what it writes is of the step it was taken after
        write = None
        if case["save_after"] is not None and 0 <= case["save_after"] - (step + 1) <= 1:
            # The first snapshot of a start may go another way than those that follow.
            last = step + 1 == case["save_after"]
            write = begin_save(strategy, Path(case["save"]) if last else Path(f"{case['save']}-before"))
    finish(write)
    evaluated = strategy.evaluate(own_share(data[case["last"]], plan, strategy.dp_rank))
    strategy.teardown()
    told = {"largest": largest(own), "experts": over_ranks(counted), "histograms": summed(taken)}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, **told}


def largest(own: list[float | None]) -> list[float]:
    """The largest of all ranks' own losses at each step; ranks before the last stage have none."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return [max(loss for loss in step if loss is not None) for step in zip(*told, strict=True)]


def summed(taken: Any) -> dict[str, list[int]]:
    """Over all ranks and all tensors, by kind."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, taken)
    found = {kind: np.zeros(len(BORDERS) + 1, dtype=int) for kind in ("weights", "gradients")}
    for name, counts in added(told).items():
        found[name.split("/")[0]][list(counts)] += list(counts.values())
    return {kind: counts.tolist() for kind, counts in found.items()}


def over_ranks(counted: dict[int, Any]) -> dict[int, list[int]]:
    """The tokens of each expert, by layer, over all ranks."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, counted)
    layers = sorted({layer for one in told for layer in one})
    return {layer: np.sum([one[layer] for one in told if layer in one], axis=0).tolist() for layer in layers}


def sabotaged(words: dict[str, Any]) -> AbstractContextManager[Any]:
    """Have the translation say other `words` to Megatron-core, as if nothing watched over them."""
    if not words:
        return nullcontext()
    from strategies.megatron import adapter, settings

    def translate(*args: Any, **options: Any) -> Any:
        right = settings.to_settings(*args, **options)
        return replace(right, transformer={**right.transformer, **words})

    return mock.patch.object(adapter, "to_settings", translate)


def begin_save(strategy: Strategy, directory: Path) -> Callable[[], None]:
    """Save, or take a snapshot where the engine does; return what writes it, in a thread as the launcher would."""
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    copies: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(copies, strategy.snapshot_bytes() > 0)
    if not any(copies):  # some ranks may have nothing to copy
        strategy.save(directory)
        return dist.barrier
    thread = ThreadPoolExecutor(max_workers=1)
    writing = strategy.snapshot(directory)
    return lambda: thread.submit(writing).result()


def finish(write: Callable[[], None] | None) -> None:
    if write is not None:
        write()
        dist.barrier()


def own_share(batch: np.ndarray, plan: Plan, dp_rank: int) -> list[np.ndarray]:
    """This rank's micro-batches of one global batch."""
    return np.split(batch, plan.num_microbatches * plan.dp)[dp_rank :: plan.dp]


if __name__ == "__main__":
    main()
