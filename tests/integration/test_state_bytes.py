"""What Capabilities says a parameter costs, against the tensors that the engine really holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import strategies
from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("state")
    hf.create_weights(ModelSpec(**SHAPE), TrainingSpec(**TRAINING), folder / "weights")
    return start(folder)


def as_plan(strategy: str, precision: str, stage: int) -> dict[str, Any]:
    split = {"dp": DP, "num_microbatches": 2}
    return {"strategy": strategy, "precision": precision, "zero_stage": stage, **split}


def start(folder: Path) -> dict[str, float]:
    cases = {"-".join(map(str, key)): as_plan(*key) for key in CASES}
    job, results = folder / "job.json", folder / "results.json"
    shared = {"model": SHAPE, "training": TRAINING, "weights": str(folder / "weights")}
    job.write_text(json.dumps({**shared, "cases": cases}), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={DP}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += [str(Path(__file__).with_name("state_worker.py")), str(job), str(results)]
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        command,
        env={**os.environ, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
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
