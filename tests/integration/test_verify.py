"""`verify` for real: the engines' own classes, as ranks of worlds that are not there, against the predictions."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from launcher.errors import EngineError, PlanError
from launcher.verbs import verify
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=5,
    hidden_size=64,
    num_attention_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=128,
    vocab_size=512,
    max_position_embeddings=64,
)
TRAINING = TrainingSpec(sequence_length=32, global_batch_size=8, num_steps=1)


def subject(model: ModelSpec, plan: Plan) -> verify.Subject:
    return verify.Subject(model=model, plan=plan, training=TRAINING, python=sys.executable)


def parts(found: verify.RankFound) -> dict[str, int | None]:
    return {row.part: row.engine for row in found.rows}


@pytest.mark.parametrize(
    ("strategy", "zero_stage", "widths"),
    [
        # Bytes a parameter of weights, gradients and optimizer, in bf16, on one of four ranks.
        ("accelerate", 0, (4.0, 4.0, 8.0)),
        ("accelerate", 2, (2.0, 4 / 4, 12 / 4)),
        ("accelerate", 3, (4 / 4, 4 / 4, 8 / 4)),
        ("deepspeed", 1, (2.0, 4.0, 12 / 4)),
        ("deepspeed", 3, (2 / 4, 4 / 4, 12 / 4)),
    ],
)
def test_data_parallel_engines_hold_what_the_formula_says(
    strategy: str, zero_stage: int, widths: tuple[float, float, float]
) -> None:
    plan = Plan(strategy=strategy, dp=4, zero_stage=zero_stage, num_microbatches=2)
    verified = verify.verify(subject(MODEL, plan))
    [found] = verified.ranks
    engine = parts(found)
    assert engine["parameters"] == MODEL.num_parameters
    for part, width in zip(("weights", "gradients", "optimizer"), widths, strict=True):
        assert engine[part] == pytest.approx(width * MODEL.num_parameters, rel=0.002), part
    assert verified.problem is None
    assert engine["working"] is not None and engine["working"] > 0


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp": 1, "tp": 2, "pp": 2, "zero_stage": 1, "pipeline_split": (3, 2)},
        {"dp": 2, "cp": 2, "zero_stage": 3},
    ],
    ids=str,
)
def test_deepspeed_builds_its_stages_parts_and_sequences(degrees: dict[str, Any]) -> None:
    plan = Plan(strategy="deepspeed", num_microbatches=2, **degrees)
    verified = verify.verify(subject(MODEL, plan), verify.Asked(all_stages=True))
    assert [found.stage for found in verified.ranks] == list(range(plan.pp))
    assert verified.problem is None
    for found in verified.ranks:
        working = parts(found)["working"]
        assert working is not None and working > 0


def test_experts_of_deepspeed_depend_on_values() -> None:
    moe = MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=32)
    mixture = ModelSpec(**{**vars(MODEL), "model_type": "mixtral", "moe": moe, "ffn_hidden_size": 32})
    plan = Plan(strategy="deepspeed", dp=2, ep=2, num_microbatches=2)
    with pytest.raises(PlanError, match=r"plan\.ep=2 cannot be verified: how many tokens reach"):
        verify.verify(subject(mixture, plan))


def test_every_stage_of_a_pipeline_is_counted_apart() -> None:
    plan = Plan(
        strategy="megatron",
        **{"dp": 2, "tp": 2, "pp": 4, "zero_stage": 1, "num_microbatches": 4},
        pipeline_split=(1, 2, 1, 1),
        sequence_parallel=True,
    )
    verified = verify.verify(subject(MODEL, plan), verify.Asked(all_stages=True))
    assert [(found.rank, found.stage) for found in verified.ranks] == [(0, 0), (4, 1), (8, 2), (12, 3)]
    assert verified.problem is None
    first, second, third, last = (parts(found) for found in verified.ranks)
    norms = MODEL.hidden_size
    rows = MODEL.vocab_size * MODEL.hidden_size // 2
    layer = third["parameters"]
    assert layer is not None
    assert (first["parameters"], second["parameters"]) == (layer + rows, 2 * layer)
    assert last["parameters"] == layer + rows + norms
    assert third["working"] is not None and second["working"] is not None
    # Three micro-batches of two layers are on their way in stage 1, and two of one layer in stage 2.
    assert 2 < second["working"] / third["working"] < 3.2


def test_experts_are_cut_over_their_ranks() -> None:
    moe = MoeSpec(num_experts=8, top_k=2, expert_ffn_hidden_size=32)
    mixture = ModelSpec(**{**vars(MODEL), "model_type": "mixtral", "moe": moe, "ffn_hidden_size": 32})
    plan = Plan(strategy="megatron", dp=4, ep=4, zero_stage=1, num_microbatches=2)
    verified = verify.verify(subject(mixture, plan))
    [found] = verified.ranks
    assert verified.problem is None
    assert parts(found)["parameters"] == mixture.num_parameters - 5 * 6 * mixture.expert_parameters
    assert parts(found)["working"] is not None
    assert any("how unevenly tokens choose experts" in note for note in found.notes)


def test_what_the_engine_refuses_at_its_start_is_said_before_it() -> None:
    plan = Plan(strategy="megatron", dp=1, tp=3, num_microbatches=8)  # past the planner, which would know
    with pytest.raises(EngineError, match=r"megatron refuses this plan on rank 0: .*num_attention_heads"):
        verify.verify(subject(MODEL, plan))
