"""What the planner says a rank holds under each of DeepSpeed's degrees, against what real ranks hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.decode import decode
from launcher.planner.price.stage_costs import stages_in_memory
from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

DENSE: dict[str, Any] = {
    "name": "tiny",
    "model_type": "llama",
    "num_layers": 5,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied": {**DENSE, "tied_embeddings": True},
    "mixture": {
        **{**DENSE, "model_type": "mixtral", "num_layers": 2},
        "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_hidden_size": 512},
    },
}
TRAINING = TrainingSpec(sequence_length=4, global_batch_size=2, num_steps=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2-zero0-fp32": ("dense", {"tp": 2, "precision": "fp32"}),
    "tp2-zero1-bf16": ("tied", {"tp": 2, "zero_stage": 1}),
    "tp2-zero3-bf16": ("dense", {"tp": 2, "zero_stage": 3}),
    "pp2-zero0-bf16": ("dense", {"pp": 2}),
    "pp2-zero1-bf16": ("tied", {"pp": 2, "zero_stage": 1, "pipeline_split": (3, 2)}),
    "pp2-zero1-fp32": ("tied", {"pp": 2, "zero_stage": 1, "precision": "fp32"}),
    "cp2-zero2-bf16": ("dense", {"cp": 2, "zero_stage": 2}),
    "cp2-zero3-fp32": ("dense", {"cp": 2, "zero_stage": 3, "precision": "fp32"}),
    "ep2-zero0-fp32": ("mixture", {"dp": 2, "ep": 2, "precision": "fp32"}),
    "ep2-zero1-bf16": ("mixture", {"dp": 2, "ep": 2, "zero_stage": 1}),
    "ep2-zero3-bf16": ("mixture", {"dp": 2, "ep": 2, "zero_stage": 3}),
}


def as_plan(words: dict[str, Any]) -> Plan:
    return Plan(**{"strategy": "deepspeed", "dp": 1, "num_microbatches": 2, **words})


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, start_ranks: Callable[..., None]) -> list[dict[str, int]]:
    folder = tmp_path_factory.mktemp("state")
    for name, words in MODELS.items():
        hf.create_weights(decode(ModelSpec, words), TRAINING, folder / name)
    cases = {name: {"model": model, "plan": vars(as_plan(words))} for name, (model, words) in CASES.items()}
    job = {"models": MODELS, "training": vars(TRAINING), "weights": str(folder), "cases": cases}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    worker = str(Path(__file__).with_name("deepspeed_state_worker.py"))
    start_ranks([worker, str(folder / "job.json"), str(folder / "held")], world_size=2)
    return [json.loads((folder / f"held-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_what_was_predicted(held: list[dict[str, int]], name: str) -> None:
    shape, words = CASES[name]
    plan = as_plan(words)
    stages = stages_in_memory(decode(ModelSpec, MODELS[shape]), plan, TRAINING)
    for rank, found in enumerate(held):
        cost = stages[plan.coordinate("pp", rank)][1]
        assert found[name] == pytest.approx(cost.weights + cost.gradients + cost.optimizer, rel=0.02)
