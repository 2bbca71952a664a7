"""Capabilities: what is refused is refused in one sentence that names key, value and remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import strategies
from strategies.base import Capabilities, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

NARROW = Capabilities(
    zero_stages=frozenset({0, 1}),
    precisions=frozenset({"fp32"}),
    recompute=frozenset({"none"}),
    state_bytes={"fp32": StateBytes(weights=4, gradients=4, optimizer=8)},
    stage_state_bytes={("fp32", 1): StateBytes(weights=4, gradients=4, optimizer=12)},
    offload_optimizer_stages=frozenset({1}),
)

REFUSED = [
    ({"tp": 2}, "x does not offer plan.tp=2 here; use plan.tp=1"),
    ({"pp": 4}, "x does not offer plan.pp=4 here; use plan.pp=1"),
    ({"zero_stage": 3}, "x has no plan.zero_stage=3; use one of 0, 1"),
    ({"precision": "bf16"}, "x cannot train in training.precision=bf16; use one of fp32"),
    ({"recompute": "full"}, "x has no plan.recompute=full; use one of none"),
    ({"sequence_parallel": True}, "x does not offer plan.sequence_parallel=true here; use false"),
    (
        {"offload_optimizer": True},
        "x cannot combine plan.offload_optimizer=true with plan.zero_stage=0; use plan.zero_stage in 1",
    ),
    (
        {"offload_optimizer": True, "zero_stage": 1, "nvme_path": "/disk"},
        "x cannot offload to plan.nvme_path=/disk with plan.zero_stage=1; use null",
    ),
    (
        {"offload_parameters": True, "zero_stage": 1},
        "x cannot combine plan.offload_parameters=true with plan.zero_stage=1; use plan.offload_parameters=false",
    ),
    (
        {"pipeline_split": (3,)},
        "x has equal stages only; use plan.pipeline_split=null",
    ),
    (
        {"recompute_num_layers": 2},
        "x has no plan.recompute_num_layers=2 with plan.recompute=none; use plan.recompute_num_layers=null",
    ),
    (
        {"recompute_modules": ("mlp",)},
        "x cannot recompute mlp alone (plan.recompute_modules); use some of core_attn",
    ),
    (
        {"rank_order": ("dp", "tp", "cp", "pp")},
        "x cannot place its ranks as plan.rank_order=[dp,tp,cp,pp]; use [tp,cp,dp,pp]",
    ),
]


def as_plan(strategy: str = "x", **changes: Any) -> Plan:
    return Plan(**{"strategy": strategy, "dp": 1, "precision": "fp32", **changes})


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_a_refusal_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert NARROW.why_not(as_plan(**changes)) == sentence


def test_a_possible_plan_is_not_refused() -> None:
    assert NARROW.why_not(as_plan(zero_stage=1, offload_optimizer=True)) is None


def test_a_stage_may_hold_something_else() -> None:
    assert NARROW.state_bytes_of(as_plan(zero_stage=0)).optimizer == 8
    assert NARROW.state_bytes_of(as_plan(zero_stage=1)).optimizer == 12


@pytest.mark.parametrize("name", ["accelerate", "deepspeed"])
@pytest.mark.parametrize("changes", [{"vp": 2}, {"precision": "fp16"}, {"recompute": "selective"}, {"ep": 2}])
def test_setup_refuses_what_why_not_refuses(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    strategy = strategies.load(name)()
    plan = as_plan(name, **changes)
    model = ModelSpec(
        name="tiny",
        model_type="llama",
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=16,
        vocab_size=16,
        max_position_embeddings=16,
    )
    refusal = strategy.capabilities.why_not(plan, model)
    training = TrainingSpec(sequence_length=4, global_batch_size=1, num_steps=1)
    with pytest.raises(ValueError) as caught:
        strategy.setup(plan, model, training, tmp_path)
    assert str(caught.value) == refusal


@pytest.mark.parametrize("name", strategies.ADAPTERS)
def test_every_strategy_declares_state_for_its_precisions(name: str) -> None:
    capabilities = strategies.load(name).capabilities
    assert set(capabilities.state_bytes) == capabilities.precisions


def test_an_engine_may_have_rules_of_its_own() -> None:
    ruled = replace(NARROW, rules=(lambda plan: "no" if plan.dp > 1 else None, lambda plan: "never"))
    assert ruled.why_not(as_plan(dp=2)) == "no"
    assert ruled.why_not(as_plan()) == "never"
    assert ruled.why_not(as_plan(tp=2)) == "x does not offer plan.tp=2 here; use plan.tp=1"


@pytest.mark.parametrize("name", strategies.engines())
def test_every_known_engine_can_be_planned(name: str) -> None:
    capabilities = strategies.capabilities(name)
    assert set(capabilities.state_bytes) == capabilities.precisions
    assert "none" in capabilities.recompute
    assert capabilities.why_not(Plan(strategy=name, dp=2, rank_order=capabilities.rank_order)) is None


def test_the_fake_strategy_is_never_planned_unasked() -> None:
    assert strategies.engines() == ["accelerate", "colossalai", "deepspeed", "megatron"]


def test_unknown_strategy_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"strategy=deepsped is unknown; did you mean 'deepspeed'\?"):
        strategies.load("deepsped")


def test_an_engine_key_may_keep_gradients_whole() -> None:
    keyed = replace(NARROW, zero_stages=frozenset({0, 2}), sync_engine_key="group.sync")

    def whole(**changes: Any) -> bool:
        plan = as_plan(**{"dp": 2, "zero_stage": 2, "num_microbatches": 4, **changes})
        return keyed.state_bytes_of(plan).whole_gradients

    off = {"group": {"sync": False}}
    assert whole(engine=off)
    assert not whole()
    assert not whole(engine={"group": {"sync": True}})
    assert not whole(engine=off, num_microbatches=1)  # the last micro-batch is always reduced
    assert not whole(engine=off, zero_stage=0)


def test_an_engine_key_may_size_the_buffers() -> None:
    keyed = replace(NARROW, buffer_elements=100, buffer_engine_key="zero.bucket")
    assert keyed.buffer_elements_of(as_plan()) == 100
    assert keyed.buffer_elements_of(as_plan(engine={"zero": {"bucket": 7}})) == 7


@pytest.mark.parametrize("name", strategies.ENGINE_PACKAGES)
def test_priced_and_unpriced_keys_are_keys_that_pass(name: str) -> None:
    capabilities = strategies.load(name).capabilities
    named = capabilities.unpriced_engine_keys | {capabilities.sync_engine_key, capabilities.buffer_engine_key}
    for dotted in named - {""}:
        level: Any = capabilities.engine_keys
        for part in dotted.split("."):
            assert part in level, dotted
            level = level[part]


def test_a_stage_above_0_needs_something_to_shard_over() -> None:
    single = replace(NARROW, shards_single_rank=False)
    assert single.why_not(as_plan(zero_stage=1)) == (
        "x cannot shard plan.zero_stage=1 over a single data parallel rank; use plan.zero_stage=0, or more GPUs"
    )
    assert single.why_not(as_plan(zero_stage=1, dp=2)) is None
    assert strategies.load("deepspeed").capabilities.why_not(as_plan("deepspeed", zero_stage=2)) is None
    assert strategies.load("accelerate").capabilities.why_not(as_plan("accelerate", zero_stage=2)) is not None
