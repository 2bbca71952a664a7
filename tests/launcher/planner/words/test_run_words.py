"""A whole run in words: what is known is said, and what is missing names the key that would tell it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from launcher.planner.search.ranking import Ranking
from launcher.planner.words.run_words import duration_text, run_words, to_json


def on(ranking: Ranking, **changes: Any) -> Ranking:
    problem = ranking.problem
    return replace(ranking, problem=replace(problem, cluster=replace(problem.cluster, **changes)))


def test_time_and_gpu_hours_are_always_known(dense: Ranking) -> None:
    words = run_words(dense)
    assert words[0] == "1,000 steps over 262.14 M tokens: 57.0 min of work, 8 GPU hours on 8 GPUs"
    assert words[1].endswith("GiB; cluster.storage_gb_per_s=null: how long it takes is not known")
    assert len(words) == 2


def test_every_key_of_the_cluster_adds_a_sentence(dense: Ranking) -> None:
    stored = on(dense, storage_gb_per_s=10.0)
    assert "cluster.mttf_hours_per_gpu=null: failures are not counted" in run_words(stored)[1]
    whole = on(dense, storage_gb_per_s=10.0, mttf_hours_per_gpu=8.0, price_per_gpu_hour=2.5)
    words = run_words(whole)
    assert "a failure comes every 60.0 min" in words[1]
    assert words[2].startswith("saved every ")
    assert "checkpoint.interval=" in words[2]
    assert words[3].endswith("at cluster.price_per_gpu_hour=2.5")
    assert json.loads(json.dumps(to_json(whole)))["num_gpus"] == 8


def test_a_cluster_that_fails_faster_than_it_saves(dense: Ranking) -> None:
    hopeless = on(dense, storage_gb_per_s=1e-6, mttf_hours_per_gpu=0.01)
    assert run_words(hopeless)[2].endswith("the run would never end")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(30.0, "30.0 s"), (119.0, "119.0 s"), (3600.0, "60.0 min"), (7200.0, "2.0 h"), (864000.0, "10.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
    assert duration_text(math.inf) == "no end"
