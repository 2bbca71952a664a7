"""The plugin lives in ColossalAI's environment, where tests/integration/test_parity_colossalai.py trains with it; here
is that nothing else asks for it, and that its groups decide the result.
"""

from __future__ import annotations

from strategies import hf
from strategies.colossalai.settings import plugin_of
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec


def test_it_runs_stage_3_in_fp32_alone() -> None:
    plans = [
        Plan(strategy="colossalai", dp=2, zero_stage=stage, precision=precision)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ]
    found = [(plan.zero_stage, plan.precision) for plan in plans if plugin_of(plan) == "TorchFSDPPlugin"]
    assert found == [(3, "fp32")]


def test_parity_would_see_one_group(tiny_model: ModelSpec, training: TrainingSpec) -> None:
    """Where all parameters decayed alike there would be nothing to put right."""
    groups = hf.parameter_groups(hf.build_unfilled_model(tiny_model), training)
    assert [group["weight_decay"] for group in groups] == [training.weight_decay, 0.0]
    assert training.weight_decay > 0
    assert all(group["params"] for group in groups)
