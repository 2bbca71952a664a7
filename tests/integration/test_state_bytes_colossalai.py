"""What Capabilities says a parameter costs with ColossalAI, against the tensors that it really holds.

The ranks run in ColossalAI's own environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strategies import hf
from strategies.colossalai import CAPABILITIES
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

SHAPE: dict[str, Any] = {
    "name": "tiny",
    "model_type": "llama",
    "num_layers": 6,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 512,
    "vocab_size": 128,
    "max_position_embeddings": 8,
}
TRAINING: dict[str, Any] = {"sequence_length": 1, "global_batch_size": 4, "num_steps": 2}
# Two states of the random generator for each module that is cut: five kilobytes each on processors.
RANDOM_STATES = 0.31
PLANS: dict[str, dict[str, Any]] = {
    "zero0": {"dp": 2},
    "zero1": {"dp": 2, "zero_stage": 1},
    "zero2": {"dp": 2, "zero_stage": 2},
    "gemini": {"dp": 2, "zero_stage": 3},
    "fsdp": {"dp": 2, "zero_stage": 3},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
}
# Beside the state, in bytes a parameter. Gemini: the last of its two chunks is still gathered.
CASES: dict[tuple[str, str], float] = {
    ("fp32", "zero0"): 0,
    ("bf16", "zero0"): 0,
    ("fp32", "zero1"): 0,
    ("bf16", "zero1"): 0,
    ("fp32", "zero2"): 0,
    ("bf16", "zero2"): 0,
    ("bf16", "gemini"): 2 / 2,
    ("fp32", "fsdp"): 0,
    ("fp32", "tp2"): RANDOM_STATES,
    ("bf16", "tp2"): RANDOM_STATES,
    ("fp32", "pp2"): 0,
    ("bf16", "pp2"): 0,
}


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, start_ranks: Callable[..., None], colossalai_python: str
) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("state")
    hf.create_weights(ModelSpec(**SHAPE), TrainingSpec(**TRAINING), folder / "weights")
    cases = {"-".join(key): as_plan(*key) for key in CASES}
    job, results = folder / "job.json", folder / "results.json"
    shared = {"model": SHAPE, "training": TRAINING, "weights": str(folder / "weights")}
    job.write_text(json.dumps({**shared, "cases": cases}), encoding="utf-8")
    worker = str(Path(__file__).with_name("state_worker.py"))
    start_ranks([worker, str(job), str(results)], world_size=2, python=colossalai_python)
    answer: dict[str, float] = json.loads(results.read_text(encoding="utf-8"))
    return answer


def as_plan(precision: str, name: str) -> dict[str, Any]:
    common = {"strategy": "colossalai", "precision": precision, "rank_order": CAPABILITIES.rank_order}
    return {**common, "dp": 1, "num_microbatches": 2, **PLANS[name]}


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_state_bytes_are_what_the_engine_holds(measured: dict[str, float], precision: str, name: str) -> None:
    plan = Plan(**as_plan(precision, name))
    state, stage = CAPABILITIES.state_bytes_of(plan), plan.zero_stage
    # The first stage has run every forward pass before its first backward pass: no gradient is there yet.
    gradients = 0.0 if plan.pp > 1 else state.gradients
    held = (
        state.weights / (plan.dp if stage >= 3 else 1)
        + gradients / (plan.dp if stage >= 2 else 1)
        + state.optimizer / (plan.dp if stage >= 1 else 1)
    )
    expected = held / (plan.tp * plan.pp) + CASES[precision, name]
    assert measured[f"{precision}-{name}"] == pytest.approx(expected, rel=0.02)
