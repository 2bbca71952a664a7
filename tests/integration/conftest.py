"""The parity bench: plans of engines, trained by real ranks, resumed by new ones, against one plain PyTorch loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.decode import decode
from strategies import hf
from strategies.bins import BORDERS
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

ROOT = Path(__file__).parents[2]
NUM_STEPS = 20
SAVE_AFTER = NUM_STEPS // 2
SCHEDULE: dict[str, Any] = {
    "sequence_length": 16,
    "global_batch_size": 8,
    "num_steps": NUM_STEPS,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "max_grad_norm": 0.5,  # below the norm of nearly every step: clipping is active
    "seed": 3,
}
TRAINING = TrainingSpec(**SCHEDULE)
_DENSE: dict[str, Any] = {
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
_EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_ffn_hidden_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": _DENSE,
    "deep": {**_DENSE, "num_layers": 4},
    # Norms over the heads see a part of the heads each, where tensor parallelism cuts them.
    "tied": {
        **{**_DENSE, "num_layers": 4, "tied_embeddings": True},
        **{"model_type": "qwen3", "head_dim": 8, "qk_norm": True},
    },
    "heads": {**_DENSE, "num_layers": 4, "num_kv_heads": 4},
    "mixture": {**_DENSE, "model_type": "mixtral", "moe": _EXPERTS},
    "unnormalized": {
        **{**_DENSE, "model_type": "qwen3_moe", "head_dim": 8, "qk_norm": True},
        "moe": {**_EXPERTS, "normalize_top_k": False},
    },
    # One layer with experts, and a loss that balances them: so the engines' formulas are the same.
    "balanced": {
        **{**_DENSE, "model_type": "qwen3_moe", "head_dim": 8, "qk_norm": True},
        "moe": {**_EXPERTS, "num_dense_layers": 1, "router_aux_loss_coef": 0.05},
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan to train: what it pins, on how many ranks, which model, in how many micro-batches."""

    plan: Mapping[str, Any]
    world_size: int = 2
    shape: str = "dense"
    num_microbatches: int = 2
    sabotage: Mapping[str, Any] = field(
        default_factory=dict
    )  # words for the engine that only a fault would say

    @property
    def start(self) -> tuple[int, str]:
        """What cases that share a start of processes have in common."""
        return self.world_size, self.shape

    def as_plan(self) -> dict[str, Any]:
        """Return the plan whole: data parallel ranks are what the degrees leave."""
        inside = [self.plan.get(degree, 1) for degree in ("tp", "pp", "cp")]
        dp = self.world_size // int(np.prod(inside))
        sequences = SCHEDULE["global_batch_size"] // dp // self.num_microbatches
        split = {"dp": dp, "num_microbatches": self.num_microbatches, "micro_batch_size": sequences}
        return {"precision": "fp32", **self.plan, **split}


class Bench:
    """Weights and data made once; ranks of one start train all its cases, new ones resume them."""

    def __init__(
        self, folder: Path, cases: Mapping[str, Case], resumed: Mapping[str, tuple[str, Case]]
    ) -> None:
        self._folder, self._cases, self._resumed = folder, cases, resumed
        np.save(folder / "data.npy", learnable_tokens(TRAINING, _DENSE["vocab_size"]))
        self._weights = cache(self._make_weights)
        self._starts: dict[tuple[str, int, str], dict[str, Any] | BaseException] = {}
        self.reference = cache(self._make_reference)

    def trained(self, name: str) -> dict[str, Any]:
        """Losses, norms and evaluation of all steps."""
        return self._started("train", self._cases[name].start)[name]

    def resumed(self, name: str) -> dict[str, Any]:
        """The same from SAVE_AFTER on: a case continued by itself, or one of the bench's `resumed`."""
        if name in self._resumed:
            source, case = self._resumed[name]
            self.trained(source)
        else:
            case = self._cases[name]
            self.trained(name)
        return self._started("resume", case.start)[name]

    def largest(self, name: str) -> list[float]:
        """The largest mean loss of one data parallel rank at each step, by the plain loop."""
        case = self._cases[name]
        return largest_share(self.reference(case.shape)["by_sequence"], case.as_plan())

    def check_histograms(self, name: str, *, padding: bool = False) -> None:
        """All weights and gradients of the first step are counted, each once; a gradient at a border may cross it.

        The rows of a padded vocabulary are zeros.
        """
        found, plain = self.trained(name)["histograms"], self.reference(self._cases[name].shape)["histograms"]
        weights = np.subtract(found["weights"], plain["weights"])
        gradients = np.subtract(found["gradients"], plain["gradients"])
        assert weights.sum() == gradients.sum()
        if padding:
            zeros = len(BORDERS) // 2
            assert weights[zeros] > 0
            weights[zeros] = gradients[zeros] = 0
        assert not weights.any()
        assert np.abs(gradients).sum() < 0.01 * sum(plain["weights"])

    def _started(self, verb: str, start: tuple[int, str]) -> Any:
        """Return what the ranks of one start found; a start that failed fails all its tests and is not repeated."""
        key = (verb, *start)
        if key not in self._starts:
            try:
                cases = self._to_train(start) if verb == "train" else self._to_resume(start)
                self._starts[key] = self._run(cases, start, verb)
            except AssertionError as error:
                self._starts[key] = error
        found = self._starts[key]
        if isinstance(found, BaseException):
            raise found
        return found

    def _to_train(self, start: tuple[int, str]) -> dict[str, Any]:
        return {
            name: {
                **{"plan": case.as_plan(), "sabotage": dict(case.sabotage)},
                **{"first": 0, "last": NUM_STEPS, "load": None},
                **{"save": str(self._folder / name), "save_after": SAVE_AFTER},
            }
            for name, case in self._cases.items()
            if case.start == start
        }

    def _to_resume(self, start: tuple[int, str]) -> dict[str, Any]:
        again = [(name, name, case) for name, case in self._cases.items()]
        other = [(name, source, case) for name, (source, case) in self._resumed.items()]
        for _, source, case in other:
            if case.start == start:
                self.trained(source)
        return {
            name: {
                **{"plan": case.as_plan(), "sabotage": {}, "load": str(self._folder / source)},
                **{"first": SAVE_AFTER, "last": NUM_STEPS, "save": None, "save_after": None},
            }
            for name, source, case in [*again, *other]
            if case.start == start and not case.sabotage
        }

    def _run(self, cases: dict[str, Any], start: tuple[int, str], verb: str) -> dict[str, Any]:
        world_size, shape = start
        label = f"{verb}-{world_size}-{shape}"
        job, results = self._folder / f"{label}.json", self._folder / f"{label}-results.json"
        shared = {"model": SHAPES[shape], "training": SCHEDULE, "data": str(self._folder / "data.npy")}
        content = {**shared, "weights": str(self._weights(shape)), "cases": cases}
        job.write_text(json.dumps(content), encoding="utf-8")
        worker = str(Path(__file__).with_name("parity_worker.py"))
        torchrun([worker, str(job), str(results)], world_size=world_size)
        answer: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return answer

    def _make_weights(self, shape: str) -> Path:
        weights = self._folder / f"weights-{shape}"
        hf.create_weights(decode(ModelSpec, SHAPES[shape]), TRAINING, weights)
        return weights

    def _make_reference(self, shape: str = "dense") -> dict[str, Any]:
        return train_plainly(self._weights(shape), np.load(self._folder / "data.npy"), TRAINING)


@pytest.fixture(scope="session")
def colossalai_python() -> str:
    """The interpreter of ColossalAI's own environment, which `make test` creates."""
    found = os.environ.get("MESHWRIGHT_COLOSSALAI_PYTHON")
    if found is None:
        pytest.fail("MESHWRIGHT_COLOSSALAI_PYTHON must name the Python of `meshwright env create colossalai`")
    return found


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., None]:
    """`torchrun`, for a test module with a worker of its own."""
    return torchrun


@pytest.fixture(scope="session")
def plainly() -> Callable[..., dict[str, Any]]:
    """`train_plainly`, for a test module with a schedule of its own."""
    return train_plainly


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., np.ndarray]:
    """`learnable_tokens`, for the same."""
    return learnable_tokens


@pytest.fixture(scope="session")
def largest_of() -> Callable[..., list[float]]:
    """`largest_share`, for the same."""
    return largest_share


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The CASES of a test module, and its RESUMED: name -> (case whose checkpoint is read, case that reads it)."""
    cases = {name: Case(**words) for name, words in request.module.CASES.items()}
    resumed = {name: (source, Case(**words)) for name, (source, words) in request.module.RESUMED.items()}
    return Bench(tmp_path_factory.mktemp("parity"), cases, resumed)


def learnable_tokens(training: TrainingSpec, vocabulary: int) -> np.ndarray:
    """Global batches (step, sequence, position), one beyond the last: counting modulo the vocabulary, with noise."""
    draw = np.random.default_rng(1)
    shape = (training.num_steps + 1, training.global_batch_size, training.sequence_length + 1)
    start = draw.integers(0, vocabulary, (*shape[:2], 1))
    counted = (start + np.arange(shape[2])) % vocabulary
    return np.where(draw.random(shape) < 0.2, draw.integers(0, vocabulary, shape), counted)


def largest_share(by_sequence: list[list[float]], plan: Mapping[str, Any]) -> list[float]:
    """From the loss of each sequence at each step to the largest mean of a data parallel rank, as the data is cut."""
    dp, pieces = plan["dp"], plan["dp"] * plan["num_microbatches"]
    shares = [np.split(np.array(step), pieces) for step in by_sequence]
    return [max(float(np.mean(share[rank::dp])) for rank in range(dp)) for share in shares]


def torchrun(
    arguments: Iterable[str],
    *,
    world_size: int,
    python: str = sys.executable,
    timeout_s: int = 300,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a worker script on so many ranks; its output is shown where it fails."""
    command = [python, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={world_size}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [*command, *rendezvous, *arguments],
        env={**os.environ, **extra, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-30000:]


def train_plainly(weights: Path, data: np.ndarray, training: TrainingSpec) -> dict[str, Any]:
    """The reference: one process, the whole global batch, nothing but torch."""
    import torch
    from transformers import AutoModelForCausalLM

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
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return each.mean(dim=1)  # of each sequence

    experts = count_experts(model, data[0])
    losses, norms, by_sequence = [], [], []
    for step in range(training.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        each = loss_of(data[step])
        by_sequence.append(each.tolist())
        loss = each.mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)))
        if step == 0:
            histograms = {
                "weights": histogram(p.detach() for p in model.parameters()),
                "gradients": histogram(p.grad for p in model.parameters()),
            }
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        evaluated = float(loss_of(data[training.num_steps]).mean())
    told = {"by_sequence": by_sequence, "experts": experts, "histograms": histograms}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, **told}


def histogram(tensors: Iterable[Any]) -> list[int]:
    """How many numbers lie in each bin, which ends with its upper border."""
    values = np.concatenate([tensor.flatten().numpy() for tensor in tensors])
    found = np.searchsorted(np.array(BORDERS, dtype=np.float32), values)
    return np.bincount(found, minlength=len(BORDERS) + 1).tolist()


def count_experts(model: Any, batch: np.ndarray) -> dict[str, list[int]]:
    """How many tokens of a batch choose each expert, by layer, from the routers' logits."""
    import torch

    if not hasattr(model.config, "num_experts_per_tok"):
        return {}
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(batch)[:, :-1], output_router_logits=True).router_logits
    chosen = [logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten() for logits in found]
    layers = [torch.bincount(indices, minlength=found[0].shape[-1]).tolist() for indices in chosen]
    return {str(layer): counts for layer, counts in enumerate(layers)}
