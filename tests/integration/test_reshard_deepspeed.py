"""A checkpoint of DeepSpeed under one plan, continued under another: as if the plan had always been that."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

SAVE_AFTER = 10
PLANS: dict[str, dict[str, Any]] = {
    "zero0": {"strategy": "deepspeed", "zero_stage": 0},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2-offload": {"strategy": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}
DEGREES: dict[str, dict[str, Any]] = {
    "tp2": {"strategy": "deepspeed", "tp": 2, "zero_stage": 1},
    "pp2": {"strategy": "deepspeed", "pp": 2, "zero_stage": 1},
    "cp2": {"strategy": "deepspeed", "cp": 2, "zero_stage": 3},
}
EXPERTS = {"strategy": "deepspeed", "ep": 2, "zero_stage": 1}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"plan": plan} for name, plan in {**PLANS, **DEGREES}.items()},
    "experts": {"plan": EXPERTS, "shape": "mixture"},
}
# Every stage's checkpoint under every other stage, and two of them on another number of ranks.
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{one}-to-{other}": (one, {"plan": PLANS[other]}) for one, other in permutations(PLANS, 2)},
    "zero3-to-zero1-alone": ("zero3", {"plan": PLANS["zero1"], "world_size": 1, "num_microbatches": 4}),
    "zero1-to-zero3-alone": ("zero1", {"plan": PLANS["zero3"], "world_size": 1, "num_microbatches": 4}),
    "zero3-to-tp2": ("zero3", {"plan": DEGREES["tp2"]}),
    "tp2-to-pp2": ("tp2", {"plan": DEGREES["pp2"]}),
    "pp2-to-cp2": ("pp2", {"plan": DEGREES["cp2"]}),
    "cp2-to-zero2-offload": ("cp2", {"plan": PLANS["zero2-offload"]}),
    "pp2-to-zero1-alone": ("pp2", {"plan": PLANS["zero1"], "world_size": 1, "num_microbatches": 4}),
    "experts-to-zero3": ("experts", {"plan": PLANS["zero3"], "shape": "mixture"}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_another_plan_continues_the_checkpoint(bench: Any, name: str) -> None:
    shape = RESUMED[name][1].get("shape", "dense")
    continued, reference = bench.resumed(name), bench.reference(shape)
    np.testing.assert_allclose(continued["losses"], reference["losses"][SAVE_AFTER:], rtol=1e-5)
    np.testing.assert_allclose(continued["norms"], reference["norms"][SAVE_AFTER:], rtol=1e-4)


@pytest.mark.parametrize("name", [*DEGREES, "experts"])
def test_the_same_plan_is_bit_identical(bench: Any, name: str) -> None:
    unbroken, resumed = bench.trained(name), bench.resumed(name)
    assert resumed["losses"] == unbroken["losses"][SAVE_AFTER:]
    assert resumed["norms"] == unbroken["norms"][SAVE_AFTER:]
    assert resumed["evaluated"] == unbroken["evaluated"]
