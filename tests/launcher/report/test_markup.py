"""Elements, escapes, tables and round axis values."""

from __future__ import annotations

import pytest

from launcher.report.markup import box, label, legend, picture, table, tag, text, ticks


def test_what_is_not_markup_is_escaped() -> None:
    assert text("a < b & c") == "a &lt; b &amp; c"
    assert tag("p", text("<x>"), class_="a", aria_label='"q"', x=1.50) == (
        '<p class="a" aria-label="&quot;q&quot;" x="1.5">&lt;x&gt;</p>'
    )
    assert "&lt;b&gt;" in label("<b>", x=1, y=2)
    assert "<title>&lt;b&gt;</title>" in box(x=0, y=0, width=1, height=1, kind="cell", title="<b>")


def test_a_picture_is_named_and_described() -> None:
    svg = picture("<g></g>", name="one", title="A & B", description="told", width=100.0, height=50.0)
    assert 'aria-labelledby="one-title one-text"' in svg
    assert '<title id="one-title">A &amp; B</title><desc id="one-text">told</desc>' in svg
    assert 'viewBox="0 0 100 50"' in svg


def test_a_table_has_a_caption_and_aligns_figures() -> None:
    html = table(("part", "s"), [("compute", "1.5")], caption="Seconds")
    assert "<caption>Seconds</caption>" in html
    assert '<th class="words" scope="col">part</th><th class="figure" scope="col">s</th>' in html
    assert '<td class="words">compute</td><td class="figure">1.5</td>' in html


def test_a_legend_names_every_colour() -> None:
    assert legend([("hue0", "a"), ("hue1", "b")]).count("swatch hue") == 2


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (80.0, [0, 20, 40, 60, 80]),
        (3.4, [0, 1, 2, 3]),
        (0.0, [0.0]),
        (0.011, [0, 0.0025, 0.005, 0.0075, 0.01]),
    ],
)
def test_axis_values_are_round(most: float, expected: list[float]) -> None:
    assert ticks(most) == pytest.approx(expected)


def test_an_axis_may_start_above_nothing() -> None:
    assert ticks(207.0, least=160.0) == pytest.approx([160, 170, 180, 190, 200])
