"""The page of a sweep: whole, without a network, with every point in picture and table."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

from launcher.sweep.page import page, predicted_and_measured
from launcher.sweep.standings import Standing, ranked

POINT = Standing(
    name="01-a",
    shown="micro_batch_size=1 & <more>",
    strategy="fake",
    plan="fake dp=1",
    num_nodes=1,
    num_gpus=1,
    tokens_per_step=1000,
    predicted_s=0.02,
    predicted_bytes=2**30,
    state="finished",
    step=10,
    num_steps=10,
    measured_s=0.03,
    measured_bytes=2**29,
)
OTHER = replace(POINT, name="02-b", shown="tp=2", strategy="megatron", measured_s=0.9, predicted_s=0.9)
FAILED = replace(POINT, name="03-c", state="failed", cause="out of memory", exit_code=10, measured_s=None)


def test_the_page_holds_every_point_and_needs_no_network() -> None:
    html = page(
        ranked([POINT, OTHER, FAILED], [{"shown": "tp=3", "reason": "tp=3 is odd"}]), name="s", folder="/s"
    )
    ElementTree.fromstring(html.partition("\n")[2].replace("&nbsp;", " ").split("<head>")[0] + "</html>")
    assert "micro_batch_size=1 &amp; &lt;more&gt;" in html
    assert "failed (10): out of memory" in html and "tp=3 is odd" in html
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|<script", html)


def test_a_point_as_predicted_lies_on_the_diagonal() -> None:
    drawn = predicted_and_measured([POINT, OTHER])
    spots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    (x, y), (right, top) = [(float(x), float(y)) for x, y in spots]
    bottom, left = 24 + 420, 76
    assert abs((right - left) - (bottom - top)) < 0.05, "as long as predicted"
    assert x - left > bottom - y, "slower than predicted lies below"
    assert "megatron" in drawn and "fake" in drawn


def test_nothing_measured_is_no_picture() -> None:
    assert predicted_and_measured([]) == ""
