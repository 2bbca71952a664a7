"""One rank of test_state_bytes_deepspeed.py: what its engine holds after two steps, counted as `verify` counts it.

Started as: python -m torch.distributed.run ... deepspeed_state_worker.py JOB.json RESULTS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

from launcher.decode import decode
from strategies.deepspeed import DeepSpeedStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist.init_process_group("gloo")
    found = {name: held(case, job) for name, case in job["cases"].items()}
    Path(f"{sys.argv[2]}-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def held(case: dict[str, Any], job: dict[str, Any]) -> int:
    from strategies.deepspeed.inspect import inspect

    model, plan = decode(ModelSpec, job["models"][case["model"]]), decode(Plan, case["plan"])
    training = TrainingSpec(**job["training"])
    strategy = DeepSpeedStrategy()
    strategy.setup(plan, model, training, Path(job["weights"]) / case["model"])
    tokens = np.zeros((plan.micro_batch_size, training.sequence_length + 1), dtype=np.int64)
    batches = [tokens] * plan.num_microbatches
    ledger: Any = SimpleNamespace(restart=lambda: None, peak_bytes=0)
    found = inspect(ledger, strategy._engine, lambda: strategy.train_step(batches, learning_rate=1e-3))
    strategy.teardown()
    return found.state_bytes


if __name__ == "__main__":
    main()
