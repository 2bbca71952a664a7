"""What DeepSpeed exports in each mode: bit for bit what its ranks hold, and transformers says the same with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.decode import decode
from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

WORLD_SIZE = 2
DENSE: dict[str, Any] = {
    **{"name": "tiny", "model_type": "llama", "num_layers": 2, "hidden_size": 32},
    **{"num_attention_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 64, "vocab_size": 66},
    **{"max_position_embeddings": 32},
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_ffn_hidden_size": 64}
SHAPES = {
    "dense": DENSE,
    "tied": {**DENSE, "tied_embeddings": True},
    "mixtral": {**DENSE, "model_type": "mixtral", "moe": EXPERTS},
    "qwen3": {
        **{**DENSE, "model_type": "qwen3_moe", "head_dim": 8, "qk_norm": True},
        "moe": {**EXPERTS, "num_dense_layers": 1},
    },
}
TRAINING = {"sequence_length": 16, "global_batch_size": 4, "num_steps": 2, "max_grad_norm": 1.0}
HOST = {"offload_optimizer": True, "offload_parameters": True}
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("tied", {"precision": "fp32"}),
    "zero0-bf16": ("dense", {}),
    "zero1": ("dense", {"precision": "fp32", "zero_stage": 1}),
    "zero1-bf16": ("tied", {"zero_stage": 1}),
    "zero2-offload-bf16": ("dense", {"zero_stage": 2, "offload_optimizer": True}),
    "zero3": ("dense", {"precision": "fp32", "zero_stage": 3}),
    "zero3-bf16": ("tied", {"zero_stage": 3}),
    "zero3-offload-bf16": ("tied", {"zero_stage": 3, **HOST}),
    "tp2": ("dense", {"precision": "fp32", "tp": 2}),
    "tp2-zero1-bf16": ("tied", {"zero_stage": 1, "tp": 2}),
    "pp2": ("tied", {"precision": "fp32", "pp": 2}),
    "pp2-zero1-bf16": ("dense", {"zero_stage": 1, "pp": 2}),
    "cp2-zero1": ("dense", {"precision": "fp32", "zero_stage": 1, "cp": 2}),
    "cp2-zero3-bf16": ("tied", {"zero_stage": 3, "cp": 2}),
    "mixtral": ("mixtral", {"precision": "fp32", "zero_stage": 1}),
    "ep2-zero2": ("mixtral", {"precision": "fp32", "zero_stage": 2, "ep": 2}),
    "ep2-zero3-bf16": ("qwen3", {"zero_stage": 3, "ep": 2}),
}


@pytest.fixture(scope="module")
def exported(start_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("export")
    for shape, words in SHAPES.items():
        hf.create_weights(decode(ModelSpec, words), TrainingSpec(**TRAINING), folder / f"start-{shape}")
    cases = {
        name: {"model": SHAPES[shape], "plan": as_plan(words), "weights": str(folder / f"start-{shape}")}
        for name, (shape, words) in PLANS.items()
    }
    job, results = folder / "job.json", folder / "results.json"
    job.write_text(
        json.dumps({"training": TRAINING, "folder": str(folder), "cases": cases}), encoding="utf-8"
    )
    worker = str(Path(__file__).with_name("export_worker.py"))
    start_ranks([worker, str(job), str(results)], world_size=WORLD_SIZE)
    answer: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return answer


def as_plan(words: dict[str, Any]) -> dict[str, Any]:
    dp = WORLD_SIZE // (words.get("tp", 1) * words.get("pp", 1) * words.get("cp", 1))
    return {"strategy": "deepspeed", "dp": dp, "num_microbatches": 4 // dp, **words}


@pytest.mark.parametrize("name", PLANS)
def test_a_start_from_the_folder_holds_the_same_bits(exported: dict[str, Any], name: str) -> None:
    found = exported[name]
    assert found["same"] and found["changed"] and found["names"]
    assert found["evaluated"][0] == found["evaluated"][1]


@pytest.mark.parametrize("name", PLANS)
def test_transformers_computes_the_same_logits(exported: dict[str, Any], name: str) -> None:
    assert exported[name]["logits"]
