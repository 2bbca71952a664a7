"""The page of runs: well-formed, self-contained, and true to the run directory."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from launcher.report.run_data import RunData, load
from launcher.report.run_page import run_page
from launcher.run_dir import RunDir


@pytest.fixture
def run(finished_run: RunDir) -> RunData:
    return load(finished_run, number=0)


def test_one_run_tells_what_it_did(run: RunData, reader: Any) -> None:
    html = run_page([run])
    seen = reader(html)
    assert reader.needs_nothing_else(html)
    assert len(set(seen.ids)) == len(seen.ids)
    assert seen.references == []
    assert seen.named == [True] * len(seen.named)
    assert len(seen.named) > 10
    assert not re.search(r"\bnan\b|\binf\b|None", html)
    told = [
        "24 of 24, finished",
        "strategy=fake",
        f"{run.newest('loss'):.4f}",
        "stopped",
        "finished",
        run.env["hosts"][0],
    ]
    told += [run.env["git"]["commit"][:12], "median step after warm-up".capitalize()]
    assert [words for words in told if words not in seen.words] == []


def test_runs_overlay_and_keep_their_ids_apart(run: RunData, reader: Any) -> None:
    html = run_page([run, replace(run, number=1, name="second")])
    seen = reader(html)
    assert len(set(seen.ids)) == len(seen.ids)
    assert 'class="curve hue1"' in html
    assert "2 runs: first, second" in seen.words


def test_a_run_that_has_not_begun_has_a_page(run: RunData, reader: Any) -> None:
    created = replace(run, records=[], events=run.events[:1])
    seen = reader(run_page([created]))
    assert "Nothing is measured before the steps are warm." in seen.words
    assert "Curves" not in seen.words


def test_alerts_and_failures_are_told_and_escaped(run: RunData, reader: Any) -> None:
    told = {"time": 0.0, "cause": "stalled", "text": "no step for <90> s"}
    failed = {"time": run.events[-1]["time"] + 1, "event": "failed", "message": "rank 1 & its node are gone"}
    words = reader(run_page([replace(run, alerts=[told], events=[*run.events, failed])])).words
    assert "no step for <90> s" in words
    assert "rank 1 & its node are gone" in words
