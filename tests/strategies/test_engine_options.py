"""The strict check of strategy.engine: nothing reaches an engine that it would ignore or that the plan decides."""

from __future__ import annotations

import re
from typing import Any

import pytest

import strategies
from strategies.engine_options import check, merge

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "deepspeed",
        {"zero_optimisation": {"stage": 3}},
        "unknown key 'strategy.engine.zero_optimisation'; did you mean 'zero_optimization'?",
    ),
    (
        "deepspeed",
        {"zero_optimization": {"reduce_bucketsize": 1}},
        "unknown key 'strategy.engine.zero_optimization.reduce_bucketsize'; did you mean 'reduce_bucket_size'?",
    ),
    (
        "deepspeed",
        {"zero_optimization": {"stage": 3}},
        "strategy.engine.zero_optimization.stage=3 is decided by plan.zero_stage; "
        "set plan.zero_stage and remove this key",
    ),
    (
        "deepspeed",
        {"train_batch_size": 8},
        "strategy.engine.train_batch_size=8 is decided by training.global_batch_size; "
        "set training.global_batch_size and remove this key",
    ),
    (
        "deepspeed",
        {"zero_optimization": 3},
        "strategy.engine.zero_optimization=3 must be a group of keys: ",
    ),
    (
        "deepspeed",
        {"autotuning": True},
        "strategy.engine.autotuning=True would have no effect here, that part of the engine is not used; remove it",
    ),
    (
        "accelerate",
        {"ddp": {"bucket_cap": 25}},
        "unknown key 'strategy.engine.ddp.bucket_cap'; did you mean 'bucket_cap_mb'?",
    ),
    (
        "accelerate",
        {"fsdp": {"reshard_after_forward": False}},
        "strategy.engine.fsdp.reshard_after_forward=False is decided by plan.zero_stage; "
        "set plan.zero_stage and remove this key",
    ),
    ("fake", {"anything": 1}, "unknown key 'strategy.engine.anything'; no key is accepted here"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED)
def test_refusals(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        check(options, strategies.load(name).capabilities)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepspeed", {}),
        (
            "deepspeed",
            {"zero_optimization": {"overlap_comm": True, "offload_optimizer": {"pin_memory": False}}},
        ),
        ("deepspeed", {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True}}),
        ("accelerate", {"ddp": {"bucket_cap_mb": 50, "static_graph": True}, "sync_each_batch": True}),
    ],
)
def test_known_keys_pass(name: str, options: dict[str, Any]) -> None:
    check(options, strategies.load(name).capabilities)


def test_merge_goes_group_by_group() -> None:
    base = {"zero": {"stage": 2, "bucket": 5}, "clip": 1.0}
    assert merge(base, {"zero": {"bucket": 7}, "log": "info"}) == {
        "zero": {"stage": 2, "bucket": 7},
        "clip": 1.0,
        "log": "info",
    }
    assert base == {"zero": {"stage": 2, "bucket": 5}, "clip": 1.0}
