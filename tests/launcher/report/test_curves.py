"""The picture of a comparison: well-formed, alone, a curve an engine, and at the right height."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from launcher.report.comparison import Comparison, Curve
from launcher.report.curves import curves

SVG = "{http://www.w3.org/2000/svg}"


def comparison(*losses: tuple[float, ...], limit: float | None = 1e-5) -> Comparison:
    drawn = (
        Curve(strategy=f"engine{n}", plan="dp=2", versions={}, losses=dict(enumerate(values, start=1)))
        for n, values in enumerate(losses)
    )
    return Comparison(curves=tuple(drawn), max_deviation=limit)


def paths(svg: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(svg).findall(f"{SVG}path")
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path.attrib["d"])]
        for path in found
    ]


def test_the_file_stands_alone_and_tells_what_it_shows() -> None:
    found = comparison((3.0, 2.0), (3.0, 2.00001))
    svg = curves(found, title="a <model> & engines")
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == "a <model> & engines"
    assert root.findtext(f"{SVG}desc") == f"{found.verdict}."
    assert "prefers-color-scheme:dark" in (root.findtext(f"{SVG}style") or "")
    assert set(re.findall(r'(?:href|src)="', svg)) == set()
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert used <= set(re.findall(r"--([\w-]+):#", svg))
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"engine0", "engine1", "checks.max_deviation=1e-05", "step"} <= set(words)


def test_equal_losses_lie_on_each_other_and_the_narrowest_on_top() -> None:
    svg = curves(comparison((3.0, 2.0, 1.0), (3.0, 2.0, 1.0), (3.0, 2.0, 1.0)), title="t")
    found = paths(svg)
    # Three in the legend, three of losses, two of deviations.
    assert len(found) == 8
    assert found[3] == found[4] == found[5]
    assert found[3][0][1] < found[3][1][1] < found[3][2][1], "a higher loss is drawn higher"
    widths = [
        float(path.attrib["stroke-width"]) for path in ElementTree.fromstring(svg).findall(f"{SVG}path")
    ]
    assert widths[3] > widths[4] > widths[5]
    assert len({y for _, y in found[6]}) == 1


def test_deviations_are_logarithmic() -> None:
    svg = curves(comparison((1.0, 1.0, 1.0, 1.0), (1 + 1e-7, 1 + 1e-6, 1 + 1e-5, 1.0)), title="t")
    heights = [y for _, y in paths(svg)[-1]]
    decade = heights[0] - heights[1]
    assert heights[1] - heights[2] == pytest.approx(decade, abs=0.2)
    assert heights[3] - heights[0] == pytest.approx(decade, abs=0.2), "no deviation lies at 1e-8"
    limit = next(
        line for line in ElementTree.fromstring(svg).iter(f"{SVG}line") if line.attrib["class"] == "limit"
    )
    assert float(limit.attrib["y1"]) == pytest.approx(heights[2], abs=0.2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_left_out(wrong: float) -> None:
    svg = curves(comparison((3.0, 2.0, 1.0), (3.0, wrong, 1.0), limit=None), title="t")
    assert len(paths(svg)[3]) == 2
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', svg))
    assert 'class="limit"' not in svg
    nothing = curves(comparison((wrong, wrong), (wrong, wrong)), title="t")
    ElementTree.fromstring(nothing)


def test_one_step_and_a_flat_loss_are_drawn() -> None:
    ElementTree.fromstring(curves(comparison((2.0,), (2.0,)), title="t"))
    ElementTree.fromstring(curves(comparison((2.0, 2.0), (4.0, 4.0), limit=0.0), title="t"))
