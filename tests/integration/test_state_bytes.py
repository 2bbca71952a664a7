"""What Capabilities says a parameter costs, against the tensors that the engine really holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strategies
from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

DP = 2
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
# Beside the state, in bytes a parameter: on a model this small, DeepSpeed's buckets and the weights it keeps
# gathered are as large as the model; FSDP2's last unit (the head) stays gathered after the forward pass.
HEAD = SHAPE["vocab_size"] * SHAPE["hidden_size"] / ModelSpec(**SHAPE).num_parameters
CASES: dict[tuple[str, str, int], float] = {
    ("accelerate", "fp32", 0): 0,
    ("accelerate", "bf16", 0): 0,
    ("accelerate", "fp32", 2): 0,
    ("accelerate", "bf16", 2): 0,
    ("accelerate", "fp32", 3): 4 * HEAD,
    ("accelerate", "bf16", 3): 2 * HEAD,
    ("deepspeed", "fp32", 0): 0,
    ("deepspeed", "bf16", 0): 0,
    ("deepspeed", "fp32", 1): 4,
    ("deepspeed", "bf16", 1): 0,
    ("deepspeed", "fp32", 2): 0,
    ("deepspeed", "bf16", 2): 0,
    ("deepspeed", "fp32", 3): 4 + 4,
    ("deepspeed", "bf16", 3): 2 + 2,
}
# The optimizer in host memory, which here is the same; below stage 3 with two buffers for the largest tensor.
LARGEST = 2 * SHAPE["ffn_hidden_size"] * SHAPE["hidden_size"] / ModelSpec(**SHAPE).num_parameters
OFFLOADED: dict[tuple[str, int], float] = {
    ("fp32", 1): 4 + 4 * LARGEST,
    ("bf16", 1): 2 + 2 * LARGEST,
    ("fp32", 2): 4 * LARGEST,
    ("bf16", 2): 2 * LARGEST,
    ("fp32", 3): 4 + 4,
    ("bf16", 3): 2 + 2,
}
# Gradients that stay whole until the last micro-batch: FSDP2 keeps the weights of its head, as above.
WHOLE: dict[tuple[str, int], float] = {
    ("fp32", 2): 0,
    ("bf16", 2): 0,
    ("fp32", 3): 4 * HEAD,
    ("bf16", 3): 2 * HEAD,
}
# DeepSpeed shards over one rank too: the whole state is there, and at stage 3 the weights it keeps gathered.
SINGLE: dict[tuple[str, int], float] = {("bf16", 1): 0, ("bf16", 2): 0, ("bf16", 3): 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state")
    hf.create_weights(ModelSpec(**SHAPE), TrainingSpec(**TRAINING), path / "weights")
    return path


@pytest.fixture(scope="module")
def measured(start_ranks: Callable[..., None], folder: Path) -> Any:
    whole = {f"whole-{precision}-{stage}": as_whole_plan(precision, stage) for precision, stage in WHOLE}
    offloaded = {
        f"offloaded-{precision}-{stage}": as_offloaded(precision, stage) for precision, stage in OFFLOADED
    }
    resident = {"-".join(map(str, key)): as_plan(*key) for key in CASES}
    return start(start_ranks, folder, {**resident, **whole, **offloaded}, dp=DP)


@pytest.fixture(scope="module")
def measured_alone(start_ranks: Callable[..., None], folder: Path) -> Any:
    cases = {
        f"{precision}-{stage}": as_plan("deepspeed", precision, stage, dp=1) for precision, stage in SINGLE
    }
    return start(start_ranks, folder, cases, dp=1)


def as_plan(strategy: str, precision: str, stage: int, *, dp: int = DP) -> dict[str, Any]:
    split = {"dp": dp, "num_microbatches": 2}
    return {"strategy": strategy, "precision": precision, "zero_stage": stage, **split}


def as_whole_plan(precision: str, stage: int) -> dict[str, Any]:
    return {**as_plan("accelerate", precision, stage), "engine": {"sync_each_batch": False}}


def as_offloaded(precision: str, stage: int) -> dict[str, Any]:
    return {**as_plan("deepspeed", precision, stage), "offload_optimizer": True}


def start(
    start_ranks: Callable[..., None], folder: Path, cases: dict[str, dict[str, Any]], *, dp: int
) -> dict[str, float]:
    job, results = folder / "job.json", folder / "results.json"
    shared = {"model": SHAPE, "training": TRAINING, "weights": str(folder / "weights")}
    job.write_text(json.dumps({**shared, "cases": cases}), encoding="utf-8")
    worker = str(Path(__file__).with_name("state_worker.py"))
    start_ranks([worker, str(job), str(results)], world_size=dp)
    answer: dict[str, float] = json.loads(results.read_text(encoding="utf-8"))
    return answer


@pytest.mark.parametrize(("strategy", "precision", "stage"), CASES)
def test_state_bytes_are_what_the_engine_holds(
    measured: Any, strategy: str, precision: str, stage: int
) -> None:
    plan = Plan(**as_plan(strategy, precision, stage))
    state = strategies.load(strategy).capabilities.state_bytes_of(plan)
    held = (
        state.weights / (DP if stage >= 3 else 1)
        + state.gradients / (DP if stage >= 2 else 1)
        + state.optimizer / (DP if stage >= 1 else 1)
    )
    expected = held + CASES[strategy, precision, stage]
    found = measured[f"{strategy}-{precision}-{stage}"]
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("precision", "stage"), WHOLE)
def test_gradients_that_are_not_reduced_are_whole(measured: Any, precision: str, stage: int) -> None:
    state = strategies.load("accelerate").capabilities.state_bytes_of(Plan(**as_whole_plan(precision, stage)))
    assert state.whole_gradients
    held = state.weights / (DP if stage >= 3 else 1) + state.gradients + state.optimizer / DP
    expected = held + WHOLE[precision, stage]
    assert measured[f"whole-{precision}-{stage}"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("precision", "stage"), OFFLOADED)
def test_an_offloaded_optimizer_holds_this(measured: Any, precision: str, stage: int) -> None:
    plan = Plan(**as_offloaded(precision, stage))
    state = strategies.load("deepspeed").capabilities.state_bytes_of(plan)
    held = state.weights / (DP if stage >= 3 else 1) + state.gradients / (DP if stage >= 2 else 1)
    held += state.gradient_copies + (state.optimizer + state.host) / DP
    expected = held + OFFLOADED[precision, stage]
    assert measured[f"offloaded-{precision}-{stage}"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("precision", "stage"), SINGLE)
def test_a_single_rank_of_deepspeed_holds_it_all(measured_alone: Any, precision: str, stage: int) -> None:
    plan = Plan(**as_plan("deepspeed", precision, stage, dp=1))
    state = strategies.load("deepspeed").capabilities.state_bytes_of(plan)
    expected = state.weights + state.gradients + state.optimizer + SINGLE[precision, stage]
    assert measured_alone[f"{precision}-{stage}"] == pytest.approx(expected, rel=0.02)
