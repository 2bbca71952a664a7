"""Deviations, the sentence about them, and the table, for made-up losses."""

from __future__ import annotations

import math

import pytest

from launcher.errors import CheckFailed
from launcher.report.comparison import HEADER, Comparison, Curve, rows, to_json, to_markdown


def curve(name: str, *losses: float) -> Curve:
    by_step = {step: loss for step, loss in enumerate(losses, start=1)}
    return Curve(strategy=name, plan="dp=2", versions={"torch": "2", name: "1"}, losses=by_step)


def compared(*curves: Curve, limit: float | None = None) -> Comparison:
    return Comparison(curves=curves, max_deviation=limit)


FIRST = curve("one", 4.0, 2.0, 1.0)


def test_the_largest_deviation_is_relative_and_has_a_step() -> None:
    found = compared(FIRST, curve("two", 4.0, 2.002, 1.0005), curve("three", 4.0, 2.0, 1.0))
    assert found.deviations(found.curves[1]) == pytest.approx({1: 0.0, 2: 1e-3, 3: 5e-4})
    assert found.largest(found.curves[1]) == (2, pytest.approx(1e-3))
    assert found.largest(found.curves[2]) == (1, 0.0)
    assert found.verdict == (
        "over 3 steps no loss is further from that of one than 0.001 (relative; two, step 2)"
    )


def test_a_limit_is_held_or_not() -> None:
    curves = (FIRST, curve("two", 4.0, 2.002, 1.0))
    compared(*curves).check()
    held = compared(*curves, limit=2e-3)
    held.check()
    assert held.verdict.endswith("; checks.max_deviation=0.002 allows that")
    broken = compared(*curves, limit=1e-4)
    assert broken.verdict.endswith(", more than checks.max_deviation=0.0001")
    with pytest.raises(
        CheckFailed, match=r"max_deviation=0\.0001: the loss of two is off .* at step 2, 2\.002"
    ):
        broken.check()
    with pytest.raises(CheckFailed):
        compared(*curves, limit=0.0).check()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_breaks_every_limit(wrong: float) -> None:
    found = compared(FIRST, curve("two", 4.0, wrong, 9.0), limit=100.0)
    assert found.largest(found.curves[1])[0] == 2
    with pytest.raises(CheckFailed, match="step 2"):
        found.check()
    both = compared(curve("one", 4.0, wrong), curve("two", 4.0, wrong), limit=1.0)
    if math.isnan(wrong):
        with pytest.raises(CheckFailed):
            both.check()


@pytest.mark.parametrize("losses", [(), (4.0, 2.0)])
def test_runs_of_other_steps_are_not_compared(losses: tuple[float, ...]) -> None:
    with pytest.raises(CheckFailed, match=f"two has losses of {len(losses)} steps and one of 3"):
        compared(FIRST, curve("two", *losses))


def test_table_page_and_data_tell_the_same() -> None:
    found = compared(FIRST, curve("two", 4.0, 2.002, 1.0), limit=1e-2)
    assert rows(found) == [
        ("one", "4.000000", "1.000000", "-", "-", "dp=2", "torch 2, one 1"),
        ("two", "4.000000", "1.000000", "0.001", "2", "dp=2", "torch 2, two 1"),
    ]
    page = to_markdown(found, title="A title", command="meshwright compare", picture="losses.svg")
    lines = page.splitlines()
    assert lines[0] == "# A title"
    assert "meshwright compare" in lines
    assert "](losses.svg)" in page
    assert [line.count("|") for line in lines if line.startswith("|")] == [len(HEADER) + 1] * 4
    data = to_json(found)
    assert (data["reference"], data["max_deviation"], data["num_steps"]) == ("one", 1e-2, 3)
    assert data["engines"][1]["largest_deviation"] == pytest.approx(1e-3)
    assert data["engines"][1]["losses"] == [4.0, 2.002, 1.0]
    assert data["verdict"] == found.verdict
