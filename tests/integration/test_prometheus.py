"""A real Prometheus beside a training run of two ranks, as benchmarks/prometheus_check.py asks it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from benchmarks import prometheus_check

# Set by continuous integration: a machine without Prometheus is a fault there, and no reason to skip.
REQUIRED = "MESHWRIGHT_TEST_PROMETHEUS"


@pytest.fixture(autouse=True)
def _installed() -> None:
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing and REQUIRED not in os.environ:
        pytest.skip(f"{' and '.join(missing)} not found; Debian's package is called prometheus")
    assert not missing


def test_rules_are_good_and_fire_for_the_histories_they_are_for() -> None:
    assert prometheus_check.promtool()["test"] == "passed"


def test_a_run_is_scraped_whole_and_a_killed_rank_fires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESHWRIGHT_WEBHOOK_URL", raising=False)
    figures = prometheus_check.scraped(tmp_path)
    assert figures["series_compared"] > 25
    assert figures["panel_queries_answered"] > 25
    assert figures["fired"] == "MeshwrightRankLost"
