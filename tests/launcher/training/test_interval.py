from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.planner.search.budget import checkpoint_interval_s
from launcher.training import interval


def test_the_default_rate_of_failures_is_the_published_one() -> None:
    assert interval.mttf_hours(num_gpus=1024) == pytest.approx(7.9)
    assert interval.mttf_hours(num_gpus=16_384) == pytest.approx(1.8)
    # Not fitted: the same study projects 0.23 h for 131,072 GPUs.
    assert interval.mttf_hours(num_gpus=131_072) == pytest.approx(0.23, rel=0.05)
    assert interval.mttf_hours(num_gpus=8) == pytest.approx(7.9 * 128)


def test_longer_saves_and_rarer_failures_make_longer_intervals() -> None:
    chosen = interval.choose(save_s=40.0, step_s=10.0, mttf_s=7.9 * 3600, measured=True)
    assert chosen.steps == round(checkpoint_interval_s(save_s=40.0, mttf_s=7.9 * 3600) / 10)
    assert 140 <= chosen.steps <= 150  # about 25 minutes
    assert interval.choose(save_s=80.0, step_s=10.0, mttf_s=7.9 * 3600, measured=True).steps > chosen.steps
    assert interval.choose(save_s=1e-6, step_s=10.0, mttf_s=60.0, measured=True).steps == 1
    for part in ("every 1", "40.00 s", "10.000 s a step (measured)", "7.9 h between failures (Young/Daly)"):
        assert part in chosen.sentence()


def test_goodput_is_what_checkpoints_lost_work_and_restarts_leave() -> None:
    calm = interval.expected_goodput(interval_s=100.0, save_s=1.0, restart_s=60.0, mttf_s=1e9)
    assert calm == pytest.approx(100 / 101, rel=1e-4)
    # To first order: a save an interval, half an interval and a restart a failure.
    stormy = interval.expected_goodput(interval_s=10.0, save_s=0.1, restart_s=5.0, mttf_s=1000.0)
    assert stormy == pytest.approx(1 - 0.01 - (5 + 5) / 1000, abs=1e-3)


def test_who_says_how_often_the_job_fails() -> None:
    cluster: Any = SimpleNamespace(mttf_hours_per_gpu=None, world_size=1024)
    assert interval.mttf_s(2.0, cluster) == 7200
    assert interval.mttf_s(None, cluster) == pytest.approx(7.9 * 3600)
    cluster.mttf_hours_per_gpu = 1024.0
    assert interval.mttf_s(None, cluster) == 3600
