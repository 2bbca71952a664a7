"""One rank of test_state_bytes.py: bytes of all live tensors at the end of a step's last forward pass, per parameter.

Started as: python -m torch.distributed.run ... state_worker.py CASES.json RESULTS.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import strategies
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

NUM_STEPS = 2  # Adam's moments exist from the second step on


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist.init_process_group("gloo")
    results = {name: measure(plan, job) for name, plan in job["cases"].items()}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(case: dict[str, Any], job: dict[str, Any]) -> float:
    # JSON knows no tuples.
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in case.items()}
    model, plan = ModelSpec(**job["model"]), Plan(**fields)
    before = storages()
    seen: list[int] = []

    def record(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, PreTrainedModel) and hasattr(module, "lm_head"):
            last = len(seen) + 1 == NUM_STEPS * plan.num_microbatches  # looking takes time: only then
            now = storages() if last else {}
            seen.append(sum(size for key, size in now.items() if key not in before))

    strategy = strategies.load(plan.strategy)()
    strategy.setup(plan, model, TrainingSpec(**job["training"]), Path(job["weights"]))
    hook = torch.nn.modules.module.register_module_forward_hook(record)
    batches = [np.array([[1, 2]])] * plan.num_microbatches
    for _ in range(NUM_STEPS):
        strategy.train_step(batches, learning_rate=1e-3)
    hook.remove()
    strategy.teardown()
    return seen[-1] / model.num_parameters


def storages() -> dict[int, int]:
    """Address -> bytes of every tensor that Python can reach."""
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    for tensor in tensors:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage.device.type != "meta":
            found[storage.data_ptr()] = storage.nbytes()
    return found


if __name__ == "__main__":
    main()
