"""Dashboard and alert rules: they ask only for what a run exposes, and every rule has histories it is tried with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.monitor.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "monitor"
EXPOSED = {item.exposed for item in METRICS} | {"meshwright_step", "meshwright_last_step_timestamp_seconds"}


@pytest.fixture(scope="module")
def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / "grafana" / "meshwright.json").read_text())["panels"]
    return found


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "prometheus" / "rules.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bmeshwright_\w+", expression))


def test_the_dashboard_asks_only_for_what_is_exposed(panels: list[dict[str, Any]]) -> None:
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) > 30
    assert {name for query in queries for name in asked(query)} <= EXPOSED
    assert all('{run=~"$run"}' in query for query in queries)


def test_the_dashboard_shows_nearly_everything(panels: list[dict[str, Any]]) -> None:
    shown = {name for panel in panels for t in panel.get("targets", []) for name in asked(t["expr"])}
    left_out = {"perplexity", "skipped_steps", "step_time_s", "memory_gib", "last_failure_time_s"}
    assert {item.name for item in METRICS if item.exposed not in shown} == left_out


def test_panels_lie_beside_each_other(panels: list[dict[str, Any]]) -> None:
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_rules_ask_only_for_what_is_exposed(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        assert asked(rule["expr"]) <= EXPOSED, rule["alert"]
        assert asked(rule["expr"]) or "up{" in rule["expr"]
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_every_rule_is_tried_by_a_history_that_breaks_it_and_one_that_does_not(
    rules: list[dict[str, Any]],
) -> None:
    tests = yaml.safe_load((FOLDER / "prometheus" / "rules_test.yml").read_text())["tests"]
    tried = [(t["alertname"], bool(t["exp_alerts"])) for test in tests for t in test["alert_rule_test"]]
    assert set(tried) == {(rule["alert"], fires) for rule in rules for fires in (True, False)}
