"""Every plan of every engine against one plain PyTorch loop on one process; and each resumed from its checkpoint.

A further strategy joins by lines in PLANS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

ROOT = Path(__file__).parents[2]
WORLD_SIZE = 2
NUM_STEPS = 20
SAVE_AFTER = NUM_STEPS // 2
SHAPE: dict[str, Any] = {
    "name": "tiny",
    "model_type": "llama",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
SCHEDULE: dict[str, Any] = {
    "sequence_length": 16,
    "global_batch_size": 8,
    "num_steps": NUM_STEPS,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "max_grad_norm": 0.5,  # below the norm of nearly every step: clipping is active
    "seed": 3,
}
PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "accelerate", "zero_stage": 0},
    "fsdp2-zero2": {"strategy": "accelerate", "zero_stage": 2},
    "fsdp2-zero3": {"strategy": "accelerate", "zero_stage": 3},
    "fsdp2-whole-gradients": {
        "strategy": "accelerate",
        "zero_stage": 3,
        "engine": {"sync_each_batch": False},
    },
    "fsdp2-recompute": {"strategy": "accelerate", "zero_stage": 3, "recompute": "full"},
    "deepspeed-zero0": {"strategy": "deepspeed", "zero_stage": 0},
    "deepspeed-zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "deepspeed-zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "deepspeed-zero3": {"strategy": "deepspeed", "zero_stage": 3},
    "deepspeed-zero3-recompute": {"strategy": "deepspeed", "zero_stage": 3, "recompute": "full"},
    "deepspeed-zero2-offload": {"strategy": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "deepspeed-zero3-offload": {
        "strategy": "deepspeed",
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}
# Engines that share a process start; one that needs an environment of its own gets a name of its own.
STARTS = {"accelerate": "torch", "deepspeed": "torch"}
MICROBATCHES = (1, 2)
EXTRAS = {"fsdp2-whole-gradients", "fsdp2-recompute", "deepspeed-zero3-recompute"}  # one count is enough
CASES = [(name, count) for name in PLANS for count in MICROBATCHES if count == 2 or name not in EXTRAS]
BF16 = ["ddp", "fsdp2-zero2", "fsdp2-zero3", *(f"deepspeed-zero{stage}" for stage in range(4))]
# A checkpoint of the first plan is read by the second: only where Capabilities.reshardable says so.
RESHARDED = [("fsdp2-zero3", "ddp"), ("ddp", "fsdp2-zero2")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("parity"))


class Bench:
    """Weights and data made once; ranks are started twice: to train, and to resume in new processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hf.create_weights(ModelSpec(**SHAPE), TrainingSpec(**SCHEDULE), folder / "weights")
        np.save(folder / "data.npy", learnable_tokens())
        self.trained = cache(self._train)
        self.resumed = cache(self._resume)
        self.reference = cache(self._reference)

    def _train(self, start: str) -> dict[str, Any]:
        whole = {"first": 0, "last": NUM_STEPS, "load": None, "save": None, "save_after": None}
        cases = {}
        for name, count in cases_of(start):
            key = f"{name}-{count}"
            saving = {"save": str(self.folder / key), "save_after": SAVE_AFTER}
            cases[key] = {**whole, **saving, "plan": as_plan(name, count)}
        for name in BF16:
            if start_of(name) == start:
                cases[f"{name}-bf16"] = {**whole, "plan": {**as_plan(name, 2), "precision": "bf16"}}
        return self._start(cases, f"{start}-train")

    def _resume(self, start: str) -> dict[str, Any]:
        rest = {"first": SAVE_AFTER, "last": NUM_STEPS, "save": None, "save_after": None}
        cases = {}
        for name, count in cases_of(start):
            key = f"{name}-{count}"
            cases[key] = {**rest, "load": str(self.folder / key), "plan": as_plan(name, count)}
        for source, target in RESHARDED:
            if start_of(source) == start:
                load = str(self.folder / f"{source}-1")
                cases[f"{source}-to-{target}"] = {**rest, "load": load, "plan": as_plan(target, 1)}
        return self._start(cases, f"{start}-resume")

    def _start(self, cases: dict[str, Any], label: str) -> dict[str, Any]:
        shared = {"model": SHAPE, "training": SCHEDULE}
        paths = {"weights": str(self.folder / "weights"), "data": str(self.folder / "data.npy")}
        job, results = self.folder / f"{label}.json", self.folder / f"{label}-results.json"
        job.write_text(json.dumps({**shared, **paths, "cases": cases}), encoding="utf-8")
        torchrun(str(Path(__file__).with_name("parity_worker.py")), str(job), str(results))
        answer: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return answer

    def _reference(self) -> dict[str, Any]:
        return train_plainly(self.folder / "weights", np.load(self.folder / "data.npy"))


def start_of(name: str) -> str:
    return STARTS[PLANS[name]["strategy"]]


def cases_of(start: str) -> list[tuple[str, int]]:
    return [(name, count) for name, count in CASES if start_of(name) == start]


def learnable_tokens() -> np.ndarray:
    """Global batches (step, sequence, position): counting modulo the vocabulary, with noise."""
    draw = np.random.default_rng(1)
    shape = (NUM_STEPS + 1, SCHEDULE["global_batch_size"], SCHEDULE["sequence_length"] + 1)
    start = draw.integers(0, SHAPE["vocab_size"], (*shape[:2], 1))
    counted = (start + np.arange(shape[2])) % SHAPE["vocab_size"]
    return np.where(draw.random(shape) < 0.2, draw.integers(0, SHAPE["vocab_size"], shape), counted)


def as_plan(name: str, count: int) -> dict[str, Any]:
    sequences = SCHEDULE["global_batch_size"] // WORLD_SIZE // count
    split = {"dp": WORLD_SIZE, "num_microbatches": count, "micro_batch_size": sequences}
    return {"precision": "fp32", **PLANS[name], **split}


def torchrun(*arguments: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={WORLD_SIZE}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [*launcher, *rendezvous, *arguments],
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


def train_plainly(weights: Path, data: np.ndarray) -> dict[str, Any]:
    """The reference: one process, the whole global batch, nothing but torch."""
    import torch
    from transformers import AutoModelForCausalLM

    training = TrainingSpec(**SCHEDULE)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
    )

    def loss_of(batch: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(batch)
        logits = model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])

    losses, norms = [], []
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        loss = loss_of(data[step])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return {"losses": losses, "norms": norms, "evaluated": float(loss_of(data[NUM_STEPS]))}


def test_reference_learns_and_clips(bench: Bench) -> None:
    reference = bench.reference()
    assert reference["losses"][-1] < reference["losses"][0] - 0.5
    assert min(reference["norms"][:10]) > SCHEDULE["max_grad_norm"]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_fp32_matches_plain_pytorch(bench: Bench, name: str, count: int) -> None:
    result, reference = bench.trained(start_of(name))[f"{name}-{count}"], bench.reference()
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-4)
    np.testing.assert_allclose(result["evaluated"], reference["evaluated"], rtol=1e-5)


@pytest.mark.parametrize(("name", "count"), CASES)
def test_resume_is_bit_identical(bench: Bench, name: str, count: int) -> None:
    start, key = start_of(name), f"{name}-{count}"
    unbroken = bench.trained(start)[key]
    resumed = bench.resumed(start)[key]
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]


@pytest.mark.parametrize("name", BF16)
def test_bf16_stays_near_fp32(bench: Bench, name: str) -> None:
    losses = bench.trained(start_of(name))[f"{name}-bf16"]["losses"]
    reference = bench.reference()["losses"]
    np.testing.assert_allclose(losses, reference, rtol=1e-2)
    assert losses != reference
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("source", "target"), RESHARDED)
def test_another_plan_continues_the_checkpoint(bench: Bench, source: str, target: str) -> None:
    continued = bench.resumed(start_of(source))[f"{source}-to-{target}"]
    np.testing.assert_allclose(continued["losses"], bench.reference()["losses"][SAVE_AFTER:], rtol=1e-5)
