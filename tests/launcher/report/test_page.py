"""The page: well-formed, self-contained, every picture named, and nothing that the text tells is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import PlanError
from launcher.planner.search.ranking import Ranking
from launcher.planner.words import explain
from launcher.planner.words.sensitivity import Shift
from launcher.planner.words.tables import gib_text, seconds_text
from launcher.planner.words.why import ILLEGAL, Answer
from launcher.report.page import page


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_the_page_is_well_formed_and_needs_nothing_else(
    name: str, request: pytest.FixtureRequest, reader: Any
) -> None:
    html = page(request.getfixturevalue(name))
    seen = reader(html)
    assert html.startswith("<!DOCTYPE html>")
    assert seen.named == [True] * 5, "memory, time, schedule, ranks, candidates"
    assert len(set(seen.ids)) == len(seen.ids)
    assert seen.references == []
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(", html)
    assert 'name="viewport"' in html
    assert 'lang="en"' in html
    assert not re.search(r"\bnan\b|\binf\b|None", html)


def test_the_page_tells_what_the_text_tells(mixture: Ranking, reader: Any) -> None:
    words = reader(page(mixture)).words
    best = mixture.choose()
    assert best.cost is not None
    told = [*explain.left_out().split(", "), gib_text(best.cost.memory.total), seconds_text(best.cost.step_s)]
    told += ["mixture on 4 x 8 G80", "plan.pipeline_split", "[3,4,4,4,4,4,4,5]", "The bubble takes 0.250 s"]
    assert [item for item in told if item not in words] == []


def test_further_questions_come_along(dense: Ranking, reader: Any) -> None:
    plain = page(dense)
    assert "Sensitivity" not in plain
    assert "Why not" not in plain
    answer = Answer(pins={"tp": 3}, verdict=ILLEGAL, reason="plan.tp=3 divides nothing & <more>")
    shift = Shift(key="cluster.gpu.memory_gib", before=80.0, after=40.0, candidate=None)
    words = reader(page(dense, answers=[answer], shifts=[shift])).words
    assert "plan.tp=3 divides nothing & <more>" in words
    assert "none fits" in words
    assert "The choice depends on cluster.gpu.memory_gib." in words


def test_rejected_classes_are_counted(dense: Ranking, mixture: Ranking, reader: Any) -> None:
    assert dense.rejected[0].reason in reader(page(dense)).words
    assert "Rejected" not in reader(page(mixture)).words


def test_nothing_fits_is_an_error(dense: Ranking) -> None:
    with pytest.raises(PlanError):
        page(replace(dense, candidates=()))
