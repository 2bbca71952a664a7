"""One rank of the Megatron weights suite: builds each case's network, fills it, runs it forward, writes it out again.

Started by test_megatron_weights.py: python -m torch.distributed.run ... megatron_weights_worker.py JOB RESULTS
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

from strategies.hf_config import from_hf_config
from strategies.megatron import network, weights
from strategies.megatron.settings import to_settings
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    extensions = network.prepare()
    groups, results = Groups(), {}
    for name, case in job["cases"].items():
        results[name] = run(case, job, extensions, groups)
    groups.leave()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


class Groups:
    """Megatron-core's process groups, made anew only where the next case is laid out differently."""

    def __init__(self) -> None:
        self._layout: Any = None

    def join(self, layout: Any) -> None:
        if layout != self._layout:
            self.leave()
            network.join_groups(layout)
            self._layout = layout

    def leave(self) -> None:
        if self._layout:
            network.leave_groups()
        self._layout = None


def run(case: dict[str, Any], job: dict[str, Any], extensions: Any, groups: Groups) -> Any:
    """Return what loading or writing complained about; else write logits and weights where the case says."""
    plan, training = Plan(**case["plan"]), TrainingSpec(**job["training"])
    settings = to_settings(plan, spec_of(case["network"]), training, extensions=extensions)
    groups.join(settings.parallel)
    config = network.build_config(settings)
    model = spec_of(case["model"])
    chunks: list[Any] = network.build_chunks(settings, config, vocab_size=model.vocab_size)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    try:
        fill_and_use(chunks, model, settings, config, case, job)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def fill_and_use(
    chunks: list[Any], model: ModelSpec, settings: Any, config: Any, case: dict[str, Any], job: dict[str, Any]
) -> None:
    weights.load(chunks, model=model, weights=Path(case["weights"]))
    if case["logits"]:
        logits = run_forward(chunks[0], np.load(job["tokens"]), model.vocab_size)
        if dist.get_rank() == 0:
            np.save(case["logits"], logits)
    if case["wrap"]:
        chunks, _ = network.wrap(settings, config, chunks)
    weights.export(
        chunks,
        model=model,
        source=Path(case["weights"]),
        directory=Path(case["export"]),
        max_shard_bytes=case["max_shard_bytes"],
    )


def spec_of(folder: str) -> ModelSpec:
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return from_hf_config(config, name="tiny")


def run_forward(chunk: Any, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return (sequences, length, vocabulary), gathered over the tensor parallel ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    ids = torch.from_numpy(tokens)
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    chunk.eval()
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(chunk(ids, positions, None))
    chunk.train()
    found: np.ndarray = logits[..., :vocab_size].numpy()
    return found


if __name__ == "__main__":
    main()
