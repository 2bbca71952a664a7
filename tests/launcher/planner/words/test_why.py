"""Why not another plan: the question as words, the answer with its rule and figures, for made-up costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import ConfigError, PlanError
from launcher.planner.cost import GIB, Candidate
from launcher.planner.search.ranking import PlanRequest, Problem, Ranking
from launcher.planner.words import why

Asked = Callable[..., list[Problem]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Let the second ranking be what the test says; the problems asked are listed."""

    def patch(outcome: Ranking | Exception) -> list[Problem]:
        problems: list[Problem] = []

        def solve(problem: Problem) -> Ranking:
            problems.append(problem)
            if isinstance(outcome, Exception):
                raise outcome
            return replace(outcome, problem=problem)

        monkeypatch.setattr(why, "solve", solve)
        return problems

    return patch


def only(ranking: Ranking, *candidates: Candidate) -> Ranking:
    return replace(ranking, candidates=candidates)


def faster(candidate: Candidate, *, by: float = 0.0, more_gib: float = 0.0, **changes: Any) -> Candidate:
    """The same costs, less time, more memory, and another plan."""
    assert candidate.cost is not None
    time, memory = candidate.cost.time, candidate.cost.memory
    cost = replace(
        candidate.cost,
        time=replace(time, compute=time.compute - by),
        memory=replace(memory, activations=memory.activations + more_gib * GIB),
    )
    return replace(candidate, cost=cost, plan=replace(candidate.plan, **changes))


@pytest.mark.parametrize(
    ("question", "pins"),
    [
        ("tp=4,pp=2", {"tp": 4, "pp": 2}),
        ("plan.tp=4, plan.recompute=full", {"tp": 4, "recompute": "full"}),
        ("strategy=deepspeed,zero_stage=3", {"strategy": "deepspeed", "zero_stage": 3}),
        ("offload_optimizer=true", {"offload_optimizer": True}),
    ],
)
def test_a_question_is_read(question: str, pins: dict[str, Any]) -> None:
    assert why.parse(question) == pins


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("", "--why '' does not say key=value; write --why tp=4,pp=2"),
        ("tp=4,pp", "does not say key=value"),
        ("zero_stag=3", "--why zero_stag=3: 'zero_stag' is no key of a plan; did you mean 'zero_stage'?"),
        ("tp=four", "--why tp=four: plan.tp=four is not a whole number"),
        ("tp=0", "plan.tp=0 must be at least 1"),
        ("tp=null", "--why tp=null asks for no value in particular"),
        ("tp=[4", "--why tp=[4: the value cannot be read"),
        ("tp=4,tp=8", "names tp twice"),
        ("recompute=ful", "did you mean 'full'?"),
        ("strategy=deepsped", "strategy=deepsped is unknown; did you mean 'deepspeed'?"),
    ],
)
def test_a_question_that_cannot_be_meant_is_one_sentence(question: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        why.parse(question)
    assert says in str(caught.value)


def test_the_chosen_plan_is_said_to_be_it(dense: Ranking) -> None:
    found = why.answer(dense, {"zero_stage": 3, "strategy": "fake"})
    assert found.verdict == why.CHOSEN
    assert why.to_text(found, dense) == (
        "why not plan.zero_stage=3, strategy=fake?\n  chosen: that is the chosen plan"
    )


def test_an_impossible_plan_names_its_rule(dense: Ranking, asked: Asked) -> None:
    problems = asked(PlanError("plan.tp=3 does not divide model.num_attention_heads=32; use one of 1, 2, 4"))
    found = why.answer(dense, {"tp": 3})
    assert problems[0].request == PlanRequest(tp=3)
    assert why.to_text(found, dense).splitlines() == [
        "why not plan.tp=3?",
        "  not possible: plan.tp=3 does not divide model.num_attention_heads=32; use one of 1, 2, 4",
    ]
    assert why.to_json(found, dense)["plan"] is None


def test_a_plan_that_does_not_fit_shows_its_memory_and_the_remedy(dense: Ranking, asked: Asked) -> None:
    asked(only(dense))
    found = why.answer(dense, {"zero_stage": 0, "recompute": "full"})
    assert found.verdict == why.TOO_LARGE
    text = why.to_text(found, dense)
    assert "no plan of llama_8b with plan.zero_stage=0, plan.recompute=full fits 8 x G80" in text
    assert "would fit" in text
    assert "the nearest such plan: fake dp=8 zero_stage=0" in text
    rows = {line.split("  ")[2]: line.split()[-3:] for line in text.splitlines() if line.startswith("    ")}
    assert rows["optimizer"] == ["11.22", "89.70", "+78.48"]
    assert rows["usable"][-2:] == ["76.00", "76.00"]
    assert why.to_json(found, dense)["predictions"]["headroom_bytes"] < 0


def test_a_slower_plan_names_the_parts(dense: Ranking, asked: Asked) -> None:
    asked(only(dense, dense.candidates[2]))
    found = why.answer(dense, {"recompute": "full"})
    assert found.verdict == why.SLOWER
    assert found.reason == "by 0.765 s a step (22.4%): recompute +1.020 s"
    data = json.loads(json.dumps(why.to_json(found, dense)))
    assert data["question"] == {"plan.recompute": "full"}
    assert data["difference"]["step_s"] == pytest.approx(0.765)
    assert data["difference"]["step_s_by_part"]["recompute"] == pytest.approx(1.02)
    assert data["plan"]["recompute"] == "full"
    lines = why.to_text(found, dense).splitlines()
    assert lines[2].startswith("  the best such plan: deepspeed dp=8")
    assert any(line.split() == ["recompute", "0.0000", "1.020", "+1.020"] for line in lines)
    assert any(line.split() == ["total", "3.420", "4.185", "+0.765"] for line in lines)


def test_another_engine_is_asked_without_the_keys_of_this_one(dense: Ranking, asked: Asked) -> None:
    ranking = replace(dense, problem=replace(dense.problem, strategies=("fake",), engine={"log": True}))
    problems = asked(only(dense, faster(dense.candidates[0], by=1.0, strategy="deepspeed")))
    found = why.answer(ranking, {"strategy": "deepspeed"})
    assert (problems[0].strategies, problems[0].engine) == (("deepspeed",), {})
    assert found.verdict == why.NOT_SLOWER
    assert found.reason == "faster by 1.000 s a step (29.2%), but the job asks for strategy=fake"


def test_a_pin_of_the_job_is_the_reason(dense: Ranking, asked: Asked) -> None:
    ranking = replace(dense, problem=replace(dense.problem, request=PlanRequest(zero_stage=3)))
    asked(only(dense, faster(dense.candidates[0], by=0.01, zero_stage=2)))
    assert why.answer(ranking, {"zero_stage": 2}).reason.endswith("but the job asks for plan.zero_stage=3")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"by": 0.1, "more_gib": 20.0},
            "apart, and of these it needs 20.00 GiB more per GPU than the lightest",
        ),
        ({"by": 0.1}, "apart, and the chosen plan counts as simpler: plan.tp=1 instead of 2"),
        ({"by": 1.0}, "the search weighs such a plan only where it is pinned"),
        ({"by": 1.0, "offload_optimizer": True}, "offloading is weighed only where nothing fits without it"),
        (
            {},
            "as fast as the chosen plan, but the prediction cannot tell plans within 5.0% of the fastest apart",
        ),
    ],
)
def test_a_plan_that_is_not_slower_says_what_speaks_against_it(
    dense: Ranking, asked: Asked, changes: dict[str, Any], says: str
) -> None:
    best = dense.candidates[0]
    other = faster(best, tp=2, **changes)
    weighed = changes.get("by", 0) < 0.5
    asked(only(dense, other))
    found = why.answer(only(dense, best, *[other] * weighed), {"tp": 2})
    assert found.verdict == why.NOT_SLOWER
    assert says in found.reason


def test_memory_that_is_kept_free_is_a_reason(dense: Ranking, asked: Asked) -> None:
    """Both need about the same, but one of them more than nine tenths of what is usable."""
    best = faster(dense.candidates[0], more_gib=68.0 - 48.18)
    other = faster(best, by=0.1, more_gib=1.5, tp=2)
    asked(only(dense, other))
    found = why.answer(only(dense, best, other), {"tp": 2})
    assert "the chosen plan leaves more of the memory free: 8.00 GiB, not 6.50" in found.reason
