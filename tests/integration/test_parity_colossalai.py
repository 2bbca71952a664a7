"""Every plan of ColossalAI that runs on processors against one plain PyTorch loop; and each of them resumed.

The ranks run in ColossalAI's own environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies import hf
from strategies.bins import BORDERS
from strategies.colossalai import CAPABILITIES
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

NUM_STEPS = 20
SAVE_AFTER = NUM_STEPS // 2
SHAPE: dict[str, Any] = {
    "name": "tiny",
    "model_type": "llama",
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 200,  # padded to 256 over two ranks
    "max_position_embeddings": 32,
    "rope_theta": 500.0,  # not what an older transformers takes where it does not find it
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied_embeddings": True},
    "small-vocabulary": {"vocab_size": 64},  # padded to 128, one of two ranks would have nothing
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
}
SCHEDULE: dict[str, Any] = {
    "sequence_length": 16,
    "global_batch_size": 16,
    "num_steps": NUM_STEPS,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "max_grad_norm": 0.5,  # below the norm of nearly every step: clipping is active
    "seed": 3,
}
TRAINING = TrainingSpec(**SCHEDULE)
STAGES_OUTSIDE = ("tp", "cp", "dp", "pp")
PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"dp": 2},
    "ddp-recompute": {"dp": 2, "recompute": "full"},
    "zero1": {"dp": 2, "zero_stage": 1},
    "zero2": {"dp": 2, "zero_stage": 2},
    "fsdp": {"dp": 2, "zero_stage": 3},
    "fsdp-recompute": {"dp": 2, "zero_stage": 3, "recompute": "full"},
    "fsdp-whole-step": {"dp": 2, "zero_stage": 3, "num_microbatches": 1},
    "zero1-offload": {"dp": 2, "zero_stage": 1, "offload_optimizer": True},
    "tp2": {"tp": 2},
    "tp2-recompute": {"tp": 2, "recompute": "full"},
    "tp2-sequence": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-uneven": {"pp": 2, "pipeline_split": (3, 1)},
    "pp2-recompute": {"pp": 2, "recompute": "full"},
    "pp2-interleaved": {"pp": 2, "vp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-pp2-sequence": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2-dp2": {"tp": 2, "dp": 2},
    "pp2-dp2": {"pp": 2, "dp": 2},
    "pp2-dp2-stages-outside": {"pp": 2, "dp": 2, "rank_order": STAGES_OUTSIDE},
}
# ZeRO beside tensor or pipeline parallelism, and Gemini, compute in 16 bits only.
BF16_PLANS: dict[str, dict[str, Any]] = {
    "bf16-ddp": {"dp": 2},
    "bf16-zero1": {"dp": 2, "zero_stage": 1},
    "bf16-zero2": {"dp": 2, "zero_stage": 2},
    "bf16-gemini": {"dp": 2, "zero_stage": 3},
    "bf16-gemini-whole-step": {"dp": 2, "zero_stage": 3, "num_microbatches": 1},
    "bf16-tp2": {"tp": 2},
    "bf16-pp2": {"pp": 2},
    "bf16-tp2-zero1": {"tp": 2, "dp": 2, "zero_stage": 1},
    "bf16-tp2-zero2": {"tp": 2, "dp": 2, "zero_stage": 2},
    "bf16-tp2-sequence-zero1": {"tp": 2, "dp": 2, "zero_stage": 1, "sequence_parallel": True},
    "bf16-pp2-zero1": {"pp": 2, "dp": 2, "zero_stage": 1},
}
FAMILY_PLANS = [
    (family, name)
    for family in FAMILIES
    for name in ("ddp", "fsdp", "tp2", "tp2-sequence", "pp2", "pp2-interleaved")
    if family != "llama"
]
GEMINI = [name for name, plan in BF16_PLANS.items() if plan.get("zero_stage") == 3]
WORLD_SIZES = (2, 4)


def as_plan(name: str) -> dict[str, Any]:
    precision = "bf16" if name in BF16_PLANS else "fp32"
    given = {"dp": 1, "num_microbatches": 2, **(PLANS | BF16_PLANS)[name]}
    sequences = SCHEDULE["global_batch_size"] // given["dp"] // given["num_microbatches"]
    common = {"strategy": "colossalai", "precision": precision, "rank_order": CAPABILITIES.rank_order}
    return {**common, **given, "micro_batch_size": sequences}


def world_of(name: str) -> int:
    return Plan(**as_plan(name)).world_size


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    start_ranks: Callable[..., None],
    plainly: Callable[..., dict[str, Any]],
    make_tokens: Callable[..., np.ndarray],
    colossalai_python: str,
) -> Bench:
    start = partial(start_ranks, python=colossalai_python, timeout_s=540)
    return Bench(tmp_path_factory.mktemp("parity"), start=start, plainly=plainly, make_tokens=make_tokens)


class Bench:
    """Weights and data made once; ranks are started twice: to train, and to resume in new processes."""

    def __init__(
        self,
        folder: Path,
        *,
        start: Callable[..., None],
        plainly: Callable[..., dict[str, Any]],
        make_tokens: Callable[..., np.ndarray],
    ) -> None:
        self.folder, self._torchrun, self._plainly = folder, start, plainly
        for family in FAMILIES:
            hf.create_weights(ModelSpec(**shape_of(family)), TRAINING, folder / family)
            np.save(folder / f"{family}.npy", make_tokens(TRAINING, shape_of(family)["vocab_size"]))
        self.trained = cache(self._train)
        self.resumed = cache(self._resume)
        self.reference = cache(self._reference)
        self.family = cache(self._family)
        self.gemini_in_fp32 = cache(self._gemini_in_fp32)

    def _train(self, world: int) -> dict[str, Any]:
        cases = {}
        for name in (name for name in PLANS | BF16_PLANS if world_of(name) == world):
            saving = {"save": str(self.folder / name), "save_after": SAVE_AFTER}
            cases[name] = {"first": 0, "last": NUM_STEPS, "load": None, **saving, "plan": as_plan(name)}
        return self._start(cases, f"train-{world}", world=world)

    def _resume(self, world: int) -> dict[str, Any]:
        rest = {"first": SAVE_AFTER, "last": NUM_STEPS, "save": None, "save_after": None}
        cases = {}
        for name in (name for name in PLANS | BF16_PLANS if world_of(name) == world):
            cases[name] = {**rest, "load": str(self.folder / name), "plan": as_plan(name)}
        return self._start(cases, f"resume-{world}", world=world)

    def _family(self, family: str) -> dict[str, Any]:
        whole = {"first": 0, "last": NUM_STEPS, "load": None, "save": None, "save_after": None}
        cases = {name: {**whole, "plan": as_plan(name)} for kind, name in FAMILY_PLANS if kind == family}
        return self._start(cases, f"family-{family}", world=2, family=family)

    def _gemini_in_fp32(self) -> dict[str, Any]:
        whole = {"first": 0, "last": NUM_STEPS, "load": None, "save": None, "save_after": None}
        cases = {name: {**whole, "plan": as_plan(name)} for name in GEMINI}
        return self._start(cases, "gemini", world=2, worker="gemini_fp32_worker.py", PYTHONOPTIMIZE="1")

    def _start(
        self,
        cases: dict[str, Any],
        label: str,
        *,
        world: int,
        family: str = "llama",
        worker: str = "parity_worker.py",
        **environment: str,
    ) -> dict[str, Any]:
        shared = {"model": shape_of(family), "training": SCHEDULE}
        paths = {"weights": str(self.folder / family), "data": str(self.folder / f"{family}.npy")}
        job, results = self.folder / f"{label}.json", self.folder / f"{label}-results.json"
        job.write_text(json.dumps({**shared, **paths, "cases": cases}), encoding="utf-8")
        script = Path(__file__).with_name(worker)
        self._torchrun([str(script), str(job), str(results)], world_size=world, environment=environment)
        answer: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return answer

    def _reference(self, family: str) -> dict[str, Any]:
        weights = self.folder / family
        return self._plainly(weights, np.load(self.folder / f"{family}.npy"), TRAINING)


def shape_of(family: str) -> dict[str, Any]:
    return SHAPE | FAMILIES[family]


def assert_equal(result: dict[str, Any], reference: dict[str, Any]) -> None:
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-4)
    np.testing.assert_allclose(result["evaluated"], reference["evaluated"], rtol=1e-5)


def test_reference_learns_and_clips(bench: Bench) -> None:
    reference = bench.reference("llama")
    assert reference["losses"][-1] < reference["losses"][0] - 0.5
    assert min(reference["norms"]) > SCHEDULE["max_grad_norm"]


@pytest.mark.parametrize("name", PLANS)
def test_fp32_matches_plain_pytorch(bench: Bench, name: str) -> None:
    assert_equal(bench.trained(world_of(name))[name], bench.reference("llama"))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp2-dp2", "pp2-dp2"])
def test_the_largest_loss_of_a_rank_is_known(
    bench: Bench, largest_of: Callable[..., list[float]], name: str
) -> None:
    reference = bench.reference("llama")
    largest = largest_of(reference["by_sequence"], as_plan(name))
    assert max(np.divide(largest, reference["losses"])) > 1.01
    np.testing.assert_allclose(bench.trained(world_of(name))[name]["largest"], largest, rtol=1e-5)


@pytest.mark.parametrize(("family", "name"), FAMILY_PLANS)
def test_other_families_match_plain_pytorch(bench: Bench, family: str, name: str) -> None:
    assert_equal(bench.family(family)[name], bench.reference(family))


@pytest.mark.parametrize("name", GEMINI)
def test_gemini_computes_right_given_the_bits(bench: Bench, name: str) -> None:
    assert_equal(bench.gemini_in_fp32()[name], bench.reference("llama"))


@pytest.mark.parametrize("name", BF16_PLANS)
def test_bf16_stays_near_fp32(bench: Bench, name: str) -> None:
    result, reference = bench.trained(world_of(name))[name], bench.reference("llama")
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-2)
    # A norm that missed ranks or micro-batches would be off by half or more.
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=2e-1)
    np.testing.assert_allclose(result["evaluated"], reference["evaluated"], rtol=1e-2)
    assert result["losses"] != reference["losses"]


@pytest.mark.parametrize("name", [*PLANS, *BF16_PLANS])
def test_resume_is_bit_identical(bench: Bench, name: str) -> None:
    unbroken = bench.trained(world_of(name))[name]
    resumed = bench.resumed(world_of(name))[name]
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]


def test_every_world_is_started() -> None:
    assert {world_of(name) for name in PLANS | BF16_PLANS} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if "tp" not in plan])
def test_histograms_count_every_number_once(bench: Bench, name: str) -> None:
    found, plain = bench.trained(world_of(name))[name]["histograms"], bench.reference("llama")["histograms"]
    weights, gradients = (np.subtract(found[kind], plain[kind]) for kind in ("weights", "gradients"))
    padding, zeros = weights.sum(), len(BORDERS) // 2  # rows of the vocabulary, where the plugin adds some
    assert padding in (0, 56 * 32)
    weights[zeros] -= padding
    gradients[zeros] -= padding
    assert not weights.any()
    assert np.abs(gradients).sum() < 0.01 * sum(plain["weights"])
