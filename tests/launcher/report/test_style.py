"""Contrast of every colour in both schemes (WCAG 2.2, sections 1.4.3 and 1.4.11), and no colour without a value."""

from __future__ import annotations

import re

import pytest

from launcher.report.style import DARK, LIGHT, NUM_HUES, css, hue


def luminance(colour: str) -> float:
    values = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_shapes_stand_out(scheme: dict[str, str]) -> None:
    for ground in ("ground", "panel"):
        for words in ("ink", "faint"):
            assert contrast(scheme[words], scheme[ground]) >= 4.5, (words, ground)
    assert contrast(scheme["limit"], scheme["ground"]) >= 4.5
    for block in ("forward", "forward-later", "backward", "backward-later"):
        assert contrast(scheme[f"on-{block.removesuffix('-later')}"], scheme[block]) >= 4.5, block
        assert contrast(scheme[block], scheme["ground"]) >= 3, block
    for index in range(NUM_HUES):
        assert contrast(scheme[f"c{index}"], scheme["ground"]) >= 3, index


def test_both_schemes_name_the_same_colours_and_all_are_defined() -> None:
    assert set(LIGHT) == set(DARK)
    assert set(re.findall(r"var\(--([\w-]+)\)", css())) <= set(LIGHT)
    assert "@media (prefers-color-scheme:dark)" in css()
    assert css().count("{") == css().count("}")


def test_hues_start_again() -> None:
    assert NUM_HUES == 10
    assert [hue(0), hue(NUM_HUES)] == ["hue0", "hue0"]
