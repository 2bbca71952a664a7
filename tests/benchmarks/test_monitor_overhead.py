"""The switch and the arithmetic of what watching costs, and one short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from benchmarks.monitor_overhead import is_on, summary


def test_each_pair_has_both_and_neither_is_always_first() -> None:
    blocks = [is_on(block) for block in range(1, 9)]
    assert blocks == [False, True, True, False, False, True, True, False]


def test_ratios_are_those_of_neighbours() -> None:
    block = 4
    durations = [9.0] * block  # warming up
    for number, usual in enumerate((1.0, 1.0, 2.0, 2.0), start=1):
        sampled = 1.4 if is_on(number) else 1.0  # one step in four; a median would not see it
        durations += [usual, usual * sampled, usual, usual]
    figures = summary(list(accumulate(durations)), block=block)
    assert figures["median_ratio"] == pytest.approx(1.1)
    assert len(figures["pairs"]) == 2
    assert figures["step_s"] == pytest.approx(1.5)


def test_a_short_run_gives_figures(repository: Path) -> None:
    words = [
        "model.num_layers=1",
        "model.hidden_size=48",
        "model.ffn_hidden_size=64",
        "training.sequence_length=16",
    ]
    command = [
        sys.executable,
        "-m",
        "benchmarks.monitor_overhead",
        "--pairs",
        "2",
        "--block",
        "4",
        "--num-ranks",
        "1",
    ]
    done = subprocess.run([*command, *words], cwd=repository, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert 0 < figures["lowest_ratio"] <= figures["median_ratio"] <= figures["highest_ratio"]
