"""One rank of test_export_deepspeed.py: trains, exports, starts again from what was exported, and compares.

Started as: python -m torch.distributed.run ... export_worker.py CASES.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from launcher.decode import decode
from strategies.deepspeed import DeepSpeedStrategy
from strategies.deepspeed.holdings import WEIGHT
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

NUM_STEPS = 2


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {name: run(name, case, job) for name, case in job["cases"].items()}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def run(name: str, case: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    model, training = decode(ModelSpec, case["model"]), TrainingSpec(**job["training"])
    plan, folder = decode(Plan, case["plan"]), Path(job["folder"]) / name
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (training.global_batch_size, 17))
    strategy = DeepSpeedStrategy()
    strategy.setup(plan, model, training, Path(case["weights"]))
    batches = np.split(tokens, plan.num_microbatches * plan.dp)[strategy.dp_rank :: plan.dp]
    initial = held(strategy, plan)
    for _ in range(NUM_STEPS):
        strategy.train_step(batches, learning_rate=1e-2)
    strategy.export(folder)
    dist.barrier()
    trained, evaluated, logits = (
        held(strategy, plan),
        strategy.evaluate(batches),
        logits_of(strategy, plan, tokens),
    )
    strategy.teardown()
    again = DeepSpeedStrategy()
    again.setup(plan, model, training, folder)
    found = held(again, plan)
    result = {
        "same": all(map(torch.equal, trained, found)) and len(trained) == len(found),
        "changed": not all(map(torch.equal, trained, initial)),
        "evaluated": [evaluated, again.evaluate(batches)],
        "names": names(folder) == names(Path(case["weights"])),
        "logits": logits is None or torch.equal(logits, reloaded_logits(folder, plan, tokens)),
    }
    again.teardown()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, result)
    return {
        "same": all(each["same"] for each in everywhere),
        "changed": all(each["changed"] for each in everywhere),
        "evaluated": result["evaluated"],
        "names": result["names"],
        "logits": all(each["logits"] for each in everywhere),
    }


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def held(strategy: DeepSpeedStrategy, plan: Plan) -> list[torch.Tensor]:
    """This rank's weights as the layers read them: a start in bf16 rounds its master weights."""
    holdings = strategy._holdings()
    dtype = torch.float32 if plan.precision == "fp32" or plan.zero_stage == 0 else torch.bfloat16
    flats = []
    for part in holdings.slices:
        with holdings.opened(part.group):
            flat = holdings.flat(WEIGHT, part.group).narrow(0, part.offset, part.numel)
            flats.append(flat.to(dtype, copy=True))
    return flats


def logits_of(strategy: DeepSpeedStrategy, plan: Plan, tokens: np.ndarray) -> torch.Tensor | None:
    """What the engine's own model says; only where one rank runs the whole model."""
    if plan.tp * plan.pp * plan.cp * plan.ep > 1:
        return None
    strategy._engine.eval()
    with torch.no_grad():
        logits: torch.Tensor = strategy._engine(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    return logits


def reloaded_logits(folder: Path, plan: Plan, tokens: np.ndarray) -> torch.Tensor:
    autocast = plan.precision == "bf16" and plan.zero_stage == 0
    dtype = torch.float32 if plan.precision == "fp32" or autocast else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits: torch.Tensor = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    return logits


if __name__ == "__main__":
    main()
