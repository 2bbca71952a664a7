"""Every plan of Accelerate and DeepSpeed against one plain PyTorch loop; and each resumed from its checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SAVE_AFTER = 10
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
EXTRAS = {"fsdp2-whole-gradients", "fsdp2-recompute", "deepspeed-zero3-recompute"}  # one count is enough
FP32 = [f"{name}-{count}" for name in PLANS for count in (1, 2) if count == 2 or name not in EXTRAS]
BF16 = [
    f"{name}-2-bf16"
    for name in ("ddp", "fsdp2-zero2", "fsdp2-zero3", *(f"deepspeed-zero{stage}" for stage in range(4)))
]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"plan": PLANS[name[:-2]], "num_microbatches": int(name[-1])} for name in FP32},
    **{name: {"plan": {**PLANS[name[:-7]], "precision": "bf16"}} for name in BF16},
}
# A checkpoint of the first plan is read by the second: only where Capabilities.reshardable says so.
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2-zero3-to-ddp": ("fsdp2-zero3-1", {"plan": PLANS["ddp"], "num_microbatches": 1}),
    "ddp-to-fsdp2-zero2": ("ddp-1", {"plan": PLANS["fsdp2-zero2"], "num_microbatches": 1}),
}


def test_reference_learns_and_clips(bench: Any) -> None:
    reference = bench.reference()
    assert reference["losses"][-1] < reference["losses"][0] - 0.5
    assert min(reference["norms"][:10]) > 0.5  # training.max_grad_norm


@pytest.mark.parametrize("name", FP32)
def test_fp32_matches_plain_pytorch(bench: Any, name: str) -> None:
    result, reference = bench.trained(name), bench.reference()
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-4)
    np.testing.assert_allclose(result["evaluated"], reference["evaluated"], rtol=1e-5)


@pytest.mark.parametrize("name", FP32)
def test_the_largest_loss_of_a_rank_is_known(bench: Any, name: str) -> None:
    largest, mean = bench.largest(name), bench.reference()["losses"]
    assert max(np.divide(largest, mean)) > 1.01
    np.testing.assert_allclose(bench.trained(name)["largest"], largest, rtol=1e-5)


@pytest.mark.parametrize("name", FP32)
def test_resume_is_bit_identical(bench: Any, name: str) -> None:
    unbroken, resumed = bench.trained(name), bench.resumed(name)
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]


@pytest.mark.parametrize("name", BF16)
def test_bf16_stays_near_fp32(bench: Any, name: str) -> None:
    losses, reference = bench.trained(name)["losses"], bench.reference()["losses"]
    np.testing.assert_allclose(losses, reference, rtol=1e-2)
    assert losses != reference
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", RESUMED)
def test_another_plan_continues_the_checkpoint(bench: Any, name: str) -> None:
    continued = bench.resumed(name)
    np.testing.assert_allclose(continued["losses"], bench.reference()["losses"][SAVE_AFTER:], rtol=1e-5)


@pytest.mark.parametrize("name", FP32)
def test_histograms_count_every_number_once(bench: Any, name: str) -> None:
    bench.check_histograms(name)
