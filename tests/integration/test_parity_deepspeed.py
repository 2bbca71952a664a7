"""Every degree of DeepSpeed against one plain PyTorch loop, and each resumed. ZeRO alone: test_parity.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SAVE_AFTER = 10


def case(shape: str = "tied", world_size: int = 2, **plan: Any) -> dict[str, Any]:
    return {"shape": shape, "world_size": world_size, "plan": {"strategy": "deepspeed", **plan}}


FP32: dict[str, dict[str, Any]] = {
    **{f"tp2-zero{stage}": case(tp=2, zero_stage=stage) for stage in (0, 2, 3)},
    **{f"pp2-zero{stage}": case(pp=2, zero_stage=stage) for stage in (0, 1)},
    "pp2-uneven-recompute": case(pp=2, zero_stage=1, pipeline_split=(3, 1), recompute="full"),
    **{f"cp2-zero{stage}": case(cp=2, zero_stage=stage) for stage in (0, 2, 3)},
    **{f"ep2-zero{stage}": case("mixture", ep=2, zero_stage=stage) for stage in (0, 1, 2, 3)},
    "ep2-unnormalized": case("unnormalized", ep=2, zero_stage=1),
    "tp4-zero1": case("heads", 4, tp=4, zero_stage=1),
    # Fewer micro-batches than stages.
    "pp4-zero1": case("heads", 4, pp=4, zero_stage=1),
    "pp2-tp2-zero0": case("heads", 4, pp=2, tp=2),
    "pp2-dp2-zero1": case("heads", 4, pp=2, zero_stage=1),
    "tp2-dp2-zero3": case("heads", 4, tp=2, zero_stage=3),
}
# Balanced experts: the extra loss is made per rank and micro-batch, so that only equal cuts compare.
BALANCED = {
    "balanced-ep2": case("balanced", ep=2, zero_stage=2, recompute="full"),
    "balanced-accelerate": {"shape": "balanced", "plan": {"strategy": "accelerate"}},
}
NARROW = {
    "tp2-zero1-bf16": case(tp=2, zero_stage=1, precision="bf16"),
    "pp2-zero0-bf16": case(pp=2, precision="bf16"),
    "pp2-zero1-bf16": case(pp=2, zero_stage=1, precision="bf16"),
    "cp2-zero1-bf16": case(cp=2, zero_stage=1, precision="bf16"),
    "ep2-zero2-bf16": case("mixture", ep=2, zero_stage=2, precision="bf16"),
}
CASES = {**FP32, **BALANCED, **NARROW}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {}


@pytest.mark.parametrize("name", FP32)
def test_fp32_matches_plain_pytorch(bench: Any, name: str) -> None:
    result, reference = bench.trained(name), bench.reference(FP32[name]["shape"])
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-5)
    np.testing.assert_allclose(result["evaluated"], reference["evaluated"], rtol=1e-5)


@pytest.mark.parametrize("name", ["ep2-zero0", "ep2-zero3", "ep2-unnormalized"])
def test_tokens_are_counted_where_experts_get_them(bench: Any, name: str) -> None:
    counted = bench.trained(name)["experts"]
    assert counted == bench.reference(FP32[name]["shape"])["experts"]
    assert len(counted) == 2
    assert max(counted["0"]) > 1.1 * np.mean(counted["0"])


@pytest.mark.parametrize("name", ["pp2-dp2-zero1", "tp2-dp2-zero3", "ep2-zero1"])
def test_the_largest_loss_of_a_rank_is_known(bench: Any, name: str) -> None:
    largest, mean = bench.largest(name), bench.reference(FP32[name]["shape"])["losses"]
    assert max(np.divide(largest, mean)) > 1.01
    np.testing.assert_allclose(bench.trained(name)["largest"], largest, rtol=1e-5)


def test_balanced_experts_match_accelerate(bench: Any) -> None:
    result, peer = bench.trained("balanced-ep2"), bench.trained("balanced-accelerate")
    np.testing.assert_allclose(result["losses"], peer["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["norms"], peer["norms"], rtol=1e-5)


def test_the_balancing_loss_takes_part(bench: Any) -> None:
    """Without it the plain loop would be matched."""
    balanced, plain = bench.trained("balanced-ep2")["losses"], bench.reference("balanced")["losses"]
    assert np.abs(np.divide(balanced, plain) - 1).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in (*FP32, *NARROW) if name != "ep2-unnormalized"])
def test_resume_is_bit_identical(bench: Any, name: str) -> None:
    unbroken, resumed = bench.trained(name), bench.resumed(name)
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]


@pytest.mark.parametrize("name", NARROW)
def test_bf16_stays_near_fp32(bench: Any, name: str) -> None:
    losses, reference = bench.trained(name)["losses"], bench.reference(NARROW[name]["shape"])["losses"]
    np.testing.assert_allclose(losses, reference, rtol=1e-2)
    assert losses != reference
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", FP32)
def test_histograms_count_every_number_once(bench: Any, name: str) -> None:
    bench.check_histograms(name)
