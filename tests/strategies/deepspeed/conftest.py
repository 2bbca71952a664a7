"""Ranks of worlds that are not there, built in a process of their own: DeepSpeed keeps its groups until one ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

ROOT = Path(__file__).parents[3]
MODEL = ModelSpec(
    name="tiny",
    model_type="qwen3",
    num_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_hidden_size=32,
    vocab_size=32,
    max_position_embeddings=32,
    qk_norm=True,
    tied_embeddings=True,
)
TRAINING = TrainingSpec(sequence_length=8, global_batch_size=4, num_steps=4, learning_rate=1e-2)

BUILD = """
import json, sys
from dataclasses import replace
from strategies.deepspeed import adapter
from strategies.fake_world import fake_world
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

model, training = ModelSpec(**json.loads(sys.argv[1])), TrainingSpec(**json.loads(sys.argv[2]))
cases = json.loads(sys.argv[3])

def describe(part):
    grid = part.grid
    return {
        "shapes": {name: list(p.shape) for name, p in part.module.named_parameters()},
        "counted_once": [n for n, p in part.module.named_parameters() if getattr(p, "ds_pipe_replicated", False)],
        "cut": [n for n, p in part.module.named_parameters() if getattr(p, "tensor_model_parallel", False)],
        "summed": [n for n, p in part.module.named_parameters() if getattr(p, "_ds_grad_allreduce_registered", False)],
        "tied": len(part.module.get_tied_weights_and_groups()) if part.plan.pp > 1 else None,
        "place": grid and [grid.get_slice_parallel_rank(), grid.get_data_parallel_rank(), grid.get_stage_id()],
        "mpu": part.mpu is not None,
    }

found = {}
deepspeed = adapter._import_deepspeed()
for name, (rank, words) in cases.items():
    plan = Plan(strategy="deepspeed", precision="fp32", **words)
    from strategies.deepspeed import inspect as inspection
    from strategies.deepspeed import network
    with fake_world(rank=rank, world_size=plan.world_size):
        deepspeed.init_distributed()
        part = network.build(inspection.source_of(model, plan, {}), model, plan, training)
        found[name] = describe(part)
        part.close()
print(json.dumps(found))
"""
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (1, {"dp": 2, "tp": 2}),
    "first": (1, {"dp": 2, "tp": 2, "pp": 2, "pipeline_split": [3, 1]}),
    "last": (6, {"dp": 2, "tp": 2, "pp": 2, "pipeline_split": [3, 1]}),
    "sequence": (1, {"dp": 2, "cp": 2}),
    "data": (1, {"dp": 2}),
}


@pytest.fixture(scope="session")
def tiny() -> tuple[ModelSpec, TrainingSpec]:
    """A model with norms over its heads and a tied head, and how it trains."""
    return MODEL, TRAINING


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its seeded start as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("weights")
    hf.create_weights(MODEL, TRAINING, folder)
    return folder


@pytest.fixture(scope="session")
def built() -> dict[str, Any]:
    """What ranks of planned worlds hold, by the names of CASES."""
    words = [json.dumps(it) for it in (vars(MODEL), vars(TRAINING), CASES)]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
