"""TrainingSpec and Plan: derived values, the learning-rate schedule, refused values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.spec import Plan, TrainingSpec, even_split

TRAINING = TrainingSpec(
    sequence_length=128, global_batch_size=8, num_steps=100, learning_rate=1e-3, warmup_steps=10
)


def test_a_step_is_one_global_batch_of_tokens() -> None:
    assert TRAINING.tokens_per_step == 1024


def test_the_learning_rate_rises_linearly_then_falls_to_the_minimum() -> None:
    training = replace(TRAINING, min_learning_rate=1e-4)
    assert training.learning_rate_at(0) == pytest.approx(1e-4)
    assert training.learning_rate_at(9) == pytest.approx(1e-3)
    assert training.learning_rate_at(10) == pytest.approx(1e-3)
    assert training.learning_rate_at(55) == pytest.approx((1e-3 + 1e-4) / 2)
    assert training.learning_rate_at(100) == pytest.approx(1e-4)
    assert training.learning_rate_at(1000) == pytest.approx(1e-4)


def test_a_constant_schedule_stays_after_the_warm_up() -> None:
    training = replace(TRAINING, schedule="constant")
    assert [training.learning_rate_at(step) for step in (4, 50, 99)] == pytest.approx([5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_length", 0),
        ("global_batch_size", -1),
        ("num_steps", 0),
        ("warmup_steps", -1),
        ("warmup_steps", 100),
        ("learning_rate", 0.0),
        ("min_learning_rate", 2e-3),
        ("adam_beta2", 1.0),
        ("max_grad_norm", -0.1),
    ],
)
def test_values_that_cannot_be_meant_are_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"training.{key}={value}"):
        replace(TRAINING, **dict[str, Any]({key: value}))


def test_a_plan_multiplies_out() -> None:
    plan = Plan(strategy="fake", dp=4, tp=2, pp=3, cp=2, ep=4, micro_batch_size=2, num_microbatches=5)
    assert plan.world_size == 48  # ep is taken out of dp * cp
    assert plan.global_batch_size == 40


def test_a_plan_refuses_degrees_below_one_and_unknown_stages() -> None:
    with pytest.raises(ValueError, match=r"plan\.tp=0 must be at least 1"):
        Plan(strategy="fake", dp=1, tp=0)
    with pytest.raises(ValueError, match=r"plan\.zero_stage=4 .* use one of 0, 1, 2, 3"):
        Plan(strategy="fake", dp=1, zero_stage=4)


def test_a_disk_is_named_whole_and_used() -> None:
    with pytest.raises(ValueError, match=r"plan\.nvme_path=disk must be an absolute path"):
        Plan(strategy="fake", dp=1, offload_optimizer=True, nvme_path="disk")
    with pytest.raises(
        ValueError, match=r"plan\.nvme_path=/disk has no effect without plan\.offload_optimizer=true"
    ):
        Plan(strategy="fake", dp=1, nvme_path="/disk")


def test_layers_that_do_not_divide_go_to_the_middle_chunks() -> None:
    assert even_split(8, 4) == (2, 2, 2, 2)
    assert even_split(10, 4) == (2, 3, 3, 2)
    assert even_split(9, 4) == (2, 2, 3, 2)
    plan = Plan(strategy="fake", dp=1, pp=2, vp=2)
    assert plan.layers_by_chunk(9) == (2, 2, 3, 2)
    assert replace(plan, pipeline_split=(1, 3, 3, 2)).layers_by_chunk(9) == (1, 3, 3, 2)


def test_neighbours_follow_the_rank_order() -> None:
    plan = Plan(strategy="fake", dp=3, tp=2, pp=4, cp=1)
    assert [plan.stride(axis) for axis in ("tp", "cp", "dp", "pp")] == [1, 2, 2, 6]
    assert [plan.coordinate(axis, 21) for axis in ("tp", "dp", "pp")] == [1, 1, 3]
    turned = replace(plan, rank_order=("tp", "cp", "pp", "dp"))
    assert [turned.stride(axis) for axis in ("tp", "pp", "dp")] == [1, 2, 8]
    assert [turned.coordinate(axis, 21) for axis in ("tp", "pp", "dp")] == [1, 2, 2]
