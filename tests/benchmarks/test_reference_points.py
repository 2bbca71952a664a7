"""The published reference points: read as printed, found by the search, and beaten by its choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.published import Case, case_of
from benchmarks.reference_cases import Point, bridge_points, fixed_points
from benchmarks.reference_points import Outcome, document, evaluate, figures_of, plan_table, time_table

POINTS = {str(point.row["id"]): point for point in fixed_points()}
PUBLISHED_S = {
    "korthikanti22-22B-full": 1.42,
    "korthikanti22-1T-selective": 71.49,
    "narayanan21-175B-1024": 31.47,
    "dgxc-175B-128": 8.91,
    "dgxc-70B-64": 14.61,
    "llama3-405B-16384-8192": 6.46,
}


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [evaluate(point) for point in POINTS.values() if point.common]


def bridge_row(**values: Any) -> dict[str, Any]:
    row = dict(POINTS["dgxc-70B-64"].row) | {
        "id": "x-1",
        "framework": "Megatron-Bridge / Megatron-Core",
        "version": "1",
        "task": "pretrain",
        "gpu": "GB200",
        "precision": "fp8",
        "tokens_per_s_per_gpu": 100,
        "usable": {"full_step_time_target": True},
    }
    row["model"] = {**row["model"], "name": "llama3-70b"}
    return row | values


@pytest.mark.parametrize("name", PUBLISHED_S)
def test_points_are_timed_as_their_sources_print(name: str) -> None:
    case = case_of(POINTS[name].row)
    assert isinstance(case, Case)
    assert case.measured_step_s == pytest.approx(PUBLISHED_S[name], abs=0.01)


def test_every_point_fills_its_gpus_and_its_batch() -> None:
    for point in POINTS.values():
        case = case_of(point.row)
        assert isinstance(case, Case), point.name
        assert case.plan.world_size == point.row["num_gpus"] == case.cluster.world_size
        assert case.plan.global_batch_size == point.row["gbs"]
        assert sum(point.pipeline_split) in (0, case.model.num_layers)


def test_parameters_are_those_of_the_names() -> None:
    sizes = {"22B": 22, "175B": 175, "530B": 530, "1T": 1008}
    for name, billions in sizes.items():
        case = case_of(POINTS[f"korthikanti22-{name}-full"].row)
        assert isinstance(case, Case)
        assert case.model.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_eleven_points_are_common_and_carry_the_peers_means() -> None:
    common = [point for point in POINTS.values() if point.common]
    simumax = [abs(point.simumax) for point in common if point.simumax is not None]
    calculon = [abs(point.calculon) for point in common if point.calculon is not None]
    assert len(simumax) == len(calculon) == 11
    assert sum(simumax) / 11 == pytest.approx(0.051, abs=0.0005)
    assert sum(calculon) / 11 == pytest.approx(0.131, abs=0.0005)


def test_the_choice_is_at_least_as_fast_as_every_published_plan(outcomes: Sequence[Outcome]) -> None:
    assert [outcome.point.name for outcome in outcomes if not outcome.at_least_as_fast] == []
    assert [outcome.point.name for outcome in outcomes if not outcome.fits] == []


def test_published_plans_are_candidates(outcomes: Sequence[Outcome]) -> None:
    assert {outcome.candidate for outcome in outcomes} == {"yes"}


def test_the_common_cases_are_predicted_better_than_the_best_peer_does(outcomes: Sequence[Outcome]) -> None:
    errors = figures_of(outcomes)["mean_error_common"]
    assert errors["ours"] < errors["simumax"]


def test_a_plan_that_the_engine_lacks_is_no_candidate() -> None:
    point = POINTS["dgxc-70B-64"]
    found = evaluate(replace(point, row={**point.row, "zero_stage": 3}))
    assert found.candidate == "no: plan.zero_stage=3"


def test_a_micro_batch_that_is_not_tried_is_named() -> None:
    point = POINTS["dgxc-70B-64"]
    shape = {**point.row["model"], "seq_len": 131072}
    found = evaluate(replace(point, row={**point.row, "model": shape, "mbs": 2}))
    assert found.missing == "no plan with its degrees"
    assert not found.fits


def test_a_choice_that_is_slower_than_a_tie_is_told(outcomes: Sequence[Outcome]) -> None:
    found = outcomes[1]
    assert found.chosen and found.chosen.cost and found.fastest_s
    slow = replace(found.chosen.cost.time, compute=1.06 * found.cost.step_s)
    slower = replace(found, chosen=replace(found.chosen, cost=replace(found.chosen.cost, time=slow)))
    assert not slower.at_least_as_fast
    assert not replace(found, fastest_s=1.01 * found.cost.step_s).at_least_as_fast


def test_the_fastest_complete_row_of_each_kind_stands_for_the_bridge_table() -> None:
    rows = [
        bridge_row(id="slow"),
        bridge_row(id="best", tokens_per_s_per_gpu=200),
        bridge_row(id="tuned", tokens_per_s_per_gpu=300, task="sft"),
        bridge_row(id="four-bit", tokens_per_s_per_gpu=400, precision="nvfp4"),
        bridge_row(id="in part", tokens_per_s_per_gpu=500, usable={"full_step_time_target": False}),
        bridge_row(id="sharded", zero_stage=3),
        bridge_row(id="elsewhere", gpu="V100-SXM2-16GB"),
        bridge_row(id="other", framework="torchtitan", tokens_per_s_per_gpu=900),
    ]
    assert [point.row["id"] for point in bridge_points(rows)] == ["best", "sharded"]


def test_tables_and_document_hold_every_point(outcomes: Sequence[Outcome]) -> None:
    figures = figures_of(outcomes)
    mean = sum(abs(outcome.error) for outcome in outcomes) / 11
    assert figures["mean_error_common"]["ours"] == pytest.approx(mean)
    assert figures["fit"] == figures["at_least_as_fast"] == figures["candidates_if_pinned"] == 11
    text = document(outcomes)
    for table in (time_table(outcomes), plan_table(outcomes)):
        assert {len(row) for row in table} == {len(table[0])}
        assert all(" | ".join(row) in text for row in table)
    assert time_table(outcomes)[-1][-3] == f"{100 * mean:.1f} %"
    assert all(f"- {outcome.point.name}: {outcome.point.source}" in text for outcome in outcomes)


def test_a_long_split_is_written_as_a_product() -> None:
    point: Point = POINTS["llama3-405B-16384-8192"]
    found = evaluate(point)
    assert found.missing is None
    assert found.chosen and found.chosen_s
    row = figures_of([found])["by_point"][0]
    assert "1,1" not in row["chosen"]
