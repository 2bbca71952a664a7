"""Plans and figures as words."""

from __future__ import annotations

from dataclasses import replace

from launcher.planner.search.ranking import Ranking
from launcher.planner.words.tables import (
    columns_of,
    count_text,
    describe,
    differences,
    grid,
    key_of,
    offload_text,
    percent_text,
    recompute_text,
    seconds_text,
    split_text,
)
from strategies.spec import Plan

REST = Plan(strategy="fake", dp=2)


def test_a_plan_at_rest_is_short_and_every_choice_is_said(mixture: Ranking) -> None:
    assert describe(REST) == "fake dp=2 zero_stage=0 micro_batch_size=1 num_microbatches=1 recompute=none"
    first, second = (candidate.plan for candidate in mixture.candidates)
    for words in (
        "tp=2 pp=4 vp=2 ep=2 etp=2",
        "recompute=full recompute_num_layers=4",
        "pipeline_split=[3,4,4,4,4,4,4,5] sequence_parallel offload_optimizer",
    ):
        assert words in describe(first)
    assert "recompute=selective recompute_modules=[mlp,moe]" in describe(second)
    assert describe(second).endswith("rank_order=[tp,cp,pp,dp]")


def test_only_columns_that_tell_something_are_shown(dense: Ranking, mixture: Ranking) -> None:
    def titles(ranking: Ranking) -> list[str]:
        plans = [candidate.plan for candidate in ranking.candidates]
        return [column.title for column in columns_of(plans, ranking.problem.model)]

    assert titles(dense) == ["strategy", "zero", "dp", "mbs", "num_mb", "recompute"]
    every = "strategy zero dp tp pp vp ep etp mbs num_mb recompute sp offload split"
    assert titles(mixture) == [*every.split(), "rank order"]


def test_words_for_recomputation_offload_and_split(mixture: Ranking) -> None:
    first, second = (candidate.plan for candidate in mixture.candidates)
    model = mixture.problem.model
    assert [recompute_text(plan, model) for plan in (REST, first, second)] == [
        "none",
        "full 4/8",
        "selective mlp+moe",
    ]
    both = replace(first, offload_parameters=True)
    assert [offload_text(plan) for plan in (REST, first, both)] == ["-", "optimizer", "optimizer+weights"]
    assert [split_text(split) for split in ((), (3, 4, 4, 5), (7,))] == ["-", "3+4*2+5", "7"]


def test_differences_are_named_by_their_keys() -> None:
    other = replace(REST, strategy="deepspeed", offload_optimizer=True)
    found = differences(REST, other)
    assert found == {"strategy": ("fake", "deepspeed"), "offload_optimizer": (False, True)}
    assert [key_of(name) for name in found] == ["strategy", "plan.offload_optimizer"]


def test_figures() -> None:
    assert [seconds_text(value) for value in (0.01234, 1.2345, 12.345, -0.5)] == [
        "0.0123",
        "1.234",
        "12.35",
        "-0.500",
    ]
    assert [percent_text(None), percent_text(0.1234)] == ["-", "12.3%"]
    assert [count_text(8.03e9), count_text(5e6)] == ["8.03 B", "5.00 M"]


def test_words_go_left_and_figures_right() -> None:
    assert grid([("name", "n", "kind"), ("a", "12", "b")], words=(0, 2)) == "  name   n  kind\n  a     12  b"
