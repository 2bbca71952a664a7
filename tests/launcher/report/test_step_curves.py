"""Curves: where points lie, how many are drawn, and what is left out."""

from __future__ import annotations

import math
import re

from launcher.report.step_curves import Curve, bundled, chart


def curve(*values: float, run: int = 0, name: str = "a") -> Curve:
    return Curve(name=name, run=run, points=tuple(enumerate(values, start=1)))


def path_of(html: str) -> list[tuple[float, float]]:
    (steps,) = re.findall(
        r'<path d="M([^"]*)" class="curve hue0"', re.sub(r"<title>[^<]*</title>", "", html)
    ) or [re.findall(r' d="M([^"]*)"', html)[0]]
    return [(float(x), float(y)) for x, y in (step.split() for step in steps.split("L"))]


def test_points_lie_in_order_and_higher_values_higher() -> None:
    points = path_of(chart([curve(1.0, 3.0, 2.0)], name="loss", title="Loss", unit="nats"))
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    first, second, third = (y for _, y in points)
    assert second < third < first


def test_a_long_curve_is_averaged_and_keeps_its_ends() -> None:
    thin = curve(*(float(i) for i in range(10_000))).thinned()
    assert 300 < len(thin.points) <= 400
    assert thin.points[0][1] < 30
    assert thin.points[-1][1] > 9_960
    assert abs(sum(y for _, y in thin.points) / len(thin.points) - 4999.5) < 1


def test_what_is_no_number_is_not_drawn() -> None:
    html = chart([curve(1.0, math.nan, math.inf, 2.0)], name="loss", title="Loss", unit="")
    assert len(path_of(html)) == 2
    assert "nan" not in html
    assert chart([curve(math.nan)], name="loss", title="Loss", unit="") == ""
    assert chart([], name="loss", title="Loss", unit="") == ""


def test_one_point_is_a_dot_and_equal_values_a_line() -> None:
    assert len(set(path_of(chart([curve(5.0)], name="a", title="A", unit="")))) == 1
    assert len({y for _, y in path_of(chart([curve(0.0, 0.0)], name="a", title="A", unit=""))}) == 1


def test_runs_differ_in_colour_and_the_text_tells_where_each_ends() -> None:
    html = chart(
        [curve(3.0, 2.5, name="one"), curve(3.0, 2.0, run=1, name="two")],
        name="loss",
        title="Loss",
        unit="nats",
    )
    assert 'class="curve hue0"' in html
    assert 'class="curve hue1"' in html
    assert "one ends at 2.5 nats; two ends at 2 nats." in html


def test_a_limit_is_inside_the_picture() -> None:
    html = chart([curve(1.0, 2.0)], name="a", title="A", unit="", limit=10.0)
    (y,) = re.findall(r'y1="([\d.]+)"[^>]*class="limit"', html)
    assert 12 <= float(y) <= 202


def test_what_dashes_mean_is_written() -> None:
    loss, other = curve(3.0, 2.0), Curve(name="a v", run=0, points=((1, 2.5),), dash=1, label="validation")
    html = chart([loss, other], name="loss", title="Loss", unit="nats")
    assert '<p class="faint">dashed: validation</p>' in html
    assert 'class="faint"' not in chart([loss], name="loss", title="Loss", unit="nats")


def test_many_curves_of_a_run_become_three() -> None:
    many = [
        Curve(name=f"a {i}", run=1, points=((1, float(i)), (2, math.nan if i else 7.0)), dash=i, label=str(i))
        for i in range(128)
    ]
    found = bundled([curve(1.0), *many])
    assert [(one.label, one.run, one.points) for one in found] == [
        ("", 0, ((1, 1.0),)),
        ("median of 128", 1, ((1, 63.5), (2, 7.0))),
        ("highest of 128", 1, ((1, 127.0), (2, 7.0))),
        ("lowest of 128", 1, ((1, 0.0), (2, 7.0))),
    ]
    assert bundled(many[:4]) == many[:4]
    html = chart(many, name="score", title="Score", unit="")
    assert html.count('class="curve') == 3
    assert "highest of 128 ends at 7" in html


def test_small_numbers_fit_beside_their_axis() -> None:
    html = chart([curve(1.31e-4, 1.49e-4)], name="rate", title="Learning rate", unit="")
    numbers = re.findall(r'text-anchor="end" class="label-faint">([^<s]*)<', html)
    assert "1.35e-4" in numbers
    assert max(map(len, numbers)) <= 7
