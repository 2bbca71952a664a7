"""The page: well-formed, self-contained, every picture named, and nothing that the text tells is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.errors import LauncherError, PlanError
from launcher.planner import explain
from launcher.planner.search import Ranking
from launcher.planner.sensitivity import Shift
from launcher.planner.tables import gib_text, seconds_text
from launcher.planner.why import ILLEGAL, Answer
from launcher.report.page import page, write

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Reader(HTMLParser):
    """Checks that elements nest, and notes ids, references and what every svg holds."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.named: list[bool] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> repeats an attribute"
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "action", "data")]
        if self.open and self.open[-1] == "svg":
            self.named[-1] |= tag == "title"
        if tag == "svg":
            assert given["role"] == "img"
            assert set((given["aria-labelledby"] or "").split()) == {
                f"{(given['aria-labelledby'] or '').split('-')[0]}-{part}" for part in ("title", "text")
            }
            self.named.append(False)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_the_page_is_well_formed_and_needs_nothing_else(name: str, request: pytest.FixtureRequest) -> None:
    html = page(request.getfixturevalue(name))
    reader = Reader(html)
    assert html.startswith("<!DOCTYPE html>")
    assert reader.named == [True] * 5, "memory, time, schedule, ranks, candidates"
    assert len(set(reader.ids)) == len(reader.ids)
    assert reader.references == []
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(", html)
    assert 'name="viewport"' in html
    assert 'lang="en"' in html
    assert not re.search(r"\bnan\b|\binf\b|None", html)


def test_the_page_tells_what_the_text_tells(mixture: Ranking) -> None:
    words = Reader(page(mixture)).words
    best = mixture.choose()
    assert best.cost is not None
    told = [*explain.left_out().split(", "), gib_text(best.cost.memory.total), seconds_text(best.cost.step_s)]
    told += ["mixture on 4 x 8 G80", "plan.pipeline_split", "[3,4,4,4,4,4,4,5]", "The bubble takes 0.250 s"]
    assert [item for item in told if item not in words] == []


def test_further_questions_come_along(dense: Ranking) -> None:
    plain = page(dense)
    assert "Sensitivity" not in plain
    assert "Why not" not in plain
    answer = Answer(pins={"tp": 3}, verdict=ILLEGAL, reason="plan.tp=3 divides nothing & <more>")
    shift = Shift(key="cluster.gpu.memory_gib", before=80.0, after=40.0, candidate=None)
    words = Reader(page(dense, answers=[answer], shifts=[shift])).words
    assert "plan.tp=3 divides nothing & <more>" in words
    assert "none fits" in words
    assert "The choice depends on cluster.gpu.memory_gib." in words


def test_rejected_classes_are_counted(dense: Ranking, mixture: Ranking) -> None:
    assert dense.rejected[0].reason in Reader(page(dense)).words
    assert "Rejected" not in Reader(page(mixture)).words


def test_nothing_fits_is_an_error(dense: Ranking) -> None:
    with pytest.raises(PlanError):
        page(replace(dense, candidates=()))


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.html"
    write(path, "<p>é</p>")
    assert path.read_text(encoding="utf-8") == "<p>é</p>"
    assert [file.name for file in path.parent.iterdir()] == ["plan.html"]
    with pytest.raises(LauncherError, match=r"report=.*deep cannot be written: Is a directory; name a file"):
        write(path.parent, "")
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]
