"""The verb `verify`: which ranks, what is compared, what is said, and what a worker answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, EngineError, PlanError
from launcher.verbs import verify
from launcher.verbs.verify import Asked, Subject, take
from strategies.inspection import Inspection
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

Call = Callable[..., Any]
MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=128,
    vocab_size=256,
    max_position_embeddings=64,
)
TRAINING = TrainingSpec(sequence_length=32, global_batch_size=8, num_steps=1, precision="fp32")
PLAN = Plan(strategy="accelerate", dp=4, zero_stage=3, num_microbatches=2, precision="fp32")
PIPELINE = Plan(strategy="megatron", dp=2, tp=2, pp=4, num_microbatches=4, precision="fp32")
PARAMETERS = MODEL.num_parameters
EXACT = Inspection(
    parameters=PARAMETERS,
    weight_bytes=PARAMETERS,
    gradient_bytes=PARAMETERS,
    optimizer_bytes=2 * PARAMETERS,
    working_bytes=10**6,
)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine says in place of a worker; `asked` collects the ranks."""
    box: dict[str, Any] = {"inspection": EXACT, "asked": []}

    def ask(_: Subject, ranks: Sequence[int]) -> list[dict[str, Any]]:
        box["asked"] += ranks
        if "error" in box:
            return [{"rank": ranks[0], **box["error"]}]
        return [{"rank": rank, "seconds": 1.0, "inspection": asdict(box["inspection"])} for rank in ranks]

    monkeypatch.setattr(verify, "_ask", ask)
    return box


def subject(plan: Plan) -> Subject:
    return Subject(model=MODEL, plan=plan, training=TRAINING, python=sys.executable)


def test_flags_are_taken_out_and_the_rest_composes() -> None:
    asked, rest = take(["model=llama3_8b", "--rank", "3", "--rank=5", "--all-stages", "plan.tp=2"])
    assert asked == Asked(ranks=(3, 5), all_stages=True)
    assert rest == ["model=llama3_8b", "plan.tp=2"]


@pytest.mark.parametrize("words", [["--rank"], ["--rank", "x"], ["--rank=-1"]])
def test_a_rank_is_a_number(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="is not the number of a rank"):
        take(words)


@pytest.mark.parametrize(
    ("order", "asked", "ranks"),
    [
        (("tp", "cp", "dp", "pp"), Asked(), {0: 0, 4: 1, 12: 3}),
        (("tp", "cp", "dp", "pp"), Asked(all_stages=True), {0: 0, 4: 1, 8: 2, 12: 3}),
        (("tp", "cp", "pp", "dp"), Asked(), {0: 0, 2: 1, 6: 3}),
        (("tp", "cp", "pp", "dp"), Asked(ranks=(13,)), {13: 2}),
    ],
)
def test_ranks_stand_in_their_stages(order: tuple[str, ...], asked: Asked, ranks: dict[int, int]) -> None:
    assert verify._ranks(MODEL, replace(PIPELINE, rank_order=order), asked) == ranks


def test_a_rank_beyond_the_world_is_refused(answers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--rank=16 is not in a world of 16 ranks"):
        verify.verify(subject(PIPELINE), Asked(ranks=(16,)))
    assert answers["asked"] == []


def test_an_engine_that_agrees_leaves_no_problem(answers: dict[str, Any]) -> None:
    verified = verify.verify(subject(PLAN))
    assert verified.problem is None
    [found] = verified.ranks
    assert found.states.difference == 0.0
    assert {row.part for row in found.rows} == {
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "states",
        "working",
    }


@pytest.mark.parametrize(("share", "agrees"), [(0.019, True), (0.021, False), (-0.021, False)])
def test_states_may_differ_by_two_percent(answers: dict[str, Any], share: float, agrees: bool) -> None:
    off = EXACT.weight_bytes + round(share * EXACT.state_bytes)
    answers["inspection"] = replace(EXACT, weight_bytes=off)
    problem = verify.verify(subject(PLAN)).problem
    assert (problem is None) is agrees
    if problem is not None:
        assert "on rank 0 (stage 0)" in problem and "2.1%" in problem


def test_what_a_step_needs_beside_the_states_decides_nothing(answers: dict[str, Any]) -> None:
    answers["inspection"] = replace(EXACT, working_bytes=10**12)
    assert verify.verify(subject(PLAN)).problem is None


def test_what_was_not_verified_is_said(answers: dict[str, Any]) -> None:
    answers["inspection"] = replace(EXACT, working_bytes=None, notes=("the weather",))
    verified = verify.verify(subject(PLAN))
    assert "not verified: the weather" in verify.to_text(verified)
    data = json.loads(json.dumps(verify.to_json(verified)))
    [rank] = data["ranks"]
    assert rank["not_verified"] == ["the weather"]
    assert rank["parts"]["working"]["engine"] is None
    assert rank["parts"]["weights"] == {
        "engine": PARAMETERS,
        "predicted": PARAMETERS,
        "difference": 0.0,
    }


def test_an_engines_own_words_are_repeated_with_engine_and_rank(answers: dict[str, Any]) -> None:
    answers["error"] = {"error": "heads must be divisible", "ours": False}
    with pytest.raises(EngineError, match="accelerate refuses this plan on rank 0: heads must be divisible"):
        verify.verify(subject(PLAN))


def test_what_our_translation_refuses_is_a_fault_of_the_plan(answers: dict[str, Any]) -> None:
    answers["error"] = {"error": "plan.tp=3 is odd", "ours": True}
    with pytest.raises(PlanError, match=r"^plan\.tp=3 is odd$"):
        verify.verify(subject(PLAN))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"zero_stage": 1}, PlanError, "accelerate has no plan.zero_stage=1"),
        ({"engine": {"fsd": {}}}, ConfigError, "unknown key 'strategy.engine.fsd'"),
        ({"offload_optimizer": True}, ConfigError, "cannot be verified: without a GPU"),
    ],
)
def test_no_engine_is_asked_about_what_is_known(
    answers: dict[str, Any], change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        verify.verify(subject(replace(PLAN, **change)))
    assert answers["asked"] == []


WORDS = ("verify", "strategy=accelerate", "model=debug_tiny", "cluster.gpu.device=cpu", "plan.zero_stage=3")


def test_the_verb_fails_where_states_differ_and_still_gives_the_figures(
    call: Call, answers: dict[str, Any]
) -> None:
    outcome = call(*WORDS, "cluster.gpus_per_node=4", "--json")
    assert outcome.code == 11
    assert outcome.json["problem"] in outcome.err
    assert outcome.json["ranks"][0]["parts"]["parameters"]["engine"] == PARAMETERS


def test_the_flags_of_plan_are_refused(call: Call, answers: dict[str, Any]) -> None:
    outcome = call(*WORDS, "--sensitivity")
    assert outcome.code == 2 and "--sensitivity is a flag of `meshwright plan`" in outcome.err


def test_a_folder_that_is_no_run_is_said(call: Call, tmp_path: Path) -> None:
    outcome = call("verify", str(tmp_path))
    assert outcome.code == 5, outcome.err
