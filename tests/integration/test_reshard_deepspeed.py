"""A checkpoint of DeepSpeed under one plan, continued under another: as if the plan had always been that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.decode import decode
from strategies import hf
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

SAVE_AFTER = 10
PLANS: dict[str, dict[str, Any]] = {
    "zero0": {"strategy": "deepspeed", "zero_stage": 0},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2-offload": {"strategy": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
    "zero3-hpz": {
        **{"strategy": "deepspeed", "zero_stage": 3},
        "engine": {
            "zero_optimization": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
        },
    },
    "cp2": {"strategy": "deepspeed", "cp": 2, "zero_stage": 3},
}
EXPERTS = {"strategy": "deepspeed", "ep": 2, "zero_stage": 1}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"plan": plan} for name, plan in PLANS.items()},
    "experts": {"plan": EXPERTS, "shape": "mixture"},
}
HOPS = [
    *(("zero0", "zero1"), ("zero1", "zero0"), ("zero1", "zero2-offload"), ("zero2-offload", "zero3")),
    *(("zero3", "zero1"), ("zero3", "zero0"), ("zero3-hpz", "cp2"), ("cp2", "zero3-hpz")),
]
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{one}-to-{other}": (one, {"plan": PLANS[other]}) for one, other in HOPS},
    "experts-to-zero3": ("experts", {"plan": PLANS["zero3"], "shape": "mixture"}),
}
NEW = [name for name in PLANS if name in ("zero3-hpz", "cp2")] + ["experts"]

SCHEDULE: dict[str, Any] = {
    **{"sequence_length": 16, "global_batch_size": 8, "num_steps": 20, "learning_rate": 1e-2},
    **{"warmup_steps": 3, "max_grad_norm": 0.5, "seed": 3},
}
SHAPE: dict[str, Any] = {
    **{"name": "tied", "model_type": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64},
    **{"num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 64, "max_position_embeddings": 32},
    "tied_embeddings": True,
}
# Five steps each, on so many ranks.
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {"dp": 2, "zero_stage": 3}),
    (2, {"dp": 1, "tp": 2, "zero_stage": 1}),
    (2, {"dp": 1, "pp": 2, "zero_stage": 0}),
    (1, {"dp": 1, "zero_stage": 1}),
]


@pytest.mark.parametrize("name", RESUMED)
def test_another_plan_continues_the_checkpoint(bench: Any, name: str) -> None:
    shape = RESUMED[name][1].get("shape", "dense")
    continued, reference = bench.resumed(name), bench.reference(shape)
    np.testing.assert_allclose(continued["losses"], reference["losses"][SAVE_AFTER:], rtol=1e-5)
    np.testing.assert_allclose(continued["norms"], reference["norms"][SAVE_AFTER:], rtol=1e-4)


def test_weights_kept_inside_a_node_change_nothing(bench: Any) -> None:
    result, reference = bench.trained("zero3-hpz"), bench.reference()
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-4)


@pytest.mark.parametrize("name", NEW)
def test_the_same_plan_is_bit_identical(bench: Any, name: str) -> None:
    unbroken, resumed = bench.trained(name), bench.resumed(name)
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]


def test_a_run_goes_through_all_kinds_of_plans(
    start_ranks: Callable[..., None],
    plainly: Callable[..., dict[str, Any]],
    make_tokens: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    training, weights, data = TrainingSpec(**SCHEDULE), tmp_path / "start", tmp_path / "data.npy"
    hf.create_weights(decode(ModelSpec, SHAPE), training, weights)
    np.save(data, make_tokens(training, SHAPE["vocab_size"]))
    losses: list[float] = []
    for hop, (world_size, words) in enumerate(CHAIN):
        plan = {"strategy": "deepspeed", "precision": "fp32", "num_microbatches": 2, **words}
        plan["micro_batch_size"] = 8 // plan["dp"] // 2
        assert Plan(**plan).world_size == world_size
        steps = {"first": 5 * hop, "last": 5 * hop + 5, "save_after": 5 * hop + 5}
        folders = {"load": str(tmp_path / str(hop - 1)) if hop else None, "save": str(tmp_path / str(hop))}
        shared = {"model": SHAPE, "training": SCHEDULE, "data": str(data), "weights": str(weights)}
        job, results = tmp_path / f"job{hop}.json", tmp_path / f"results{hop}.json"
        job.write_text(json.dumps({**shared, "cases": {"x": {"plan": plan, **steps, **folders}}}), "utf-8")
        worker = str(Path(__file__).with_name("parity_worker.py"))
        start_ranks([worker, str(job), str(results)], world_size=world_size)
        losses += json.loads(results.read_text("utf-8"))["x"]["losses"]
    reference = plainly(weights, np.load(data), training)["losses"]
    np.testing.assert_allclose(losses, reference, rtol=1e-5)
