"""Time, money and checkpoints of a whole run, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from launcher.planner.cost import Candidate
from launcher.planner.search.budget import Budget, budget, checkpoint_interval_s, expected_seconds
from launcher.planner.search.ranking import Ranking


def test_the_interval_is_that_of_young_where_saving_is_quick() -> None:
    # sqrt(2 * 10 * 80,000) = 1264.9; Daly adds 1264.9 * (sqrt(10 / 160,000) / 3 + ...) = 3.3 and takes the 10 off.
    assert checkpoint_interval_s(save_s=10.0, mttf_s=80_000.0) == pytest.approx(
        1264.911 + 3.342 - 10, abs=0.01
    )


def test_the_interval_is_the_mttf_where_saving_takes_longer_than_twice_that() -> None:
    assert checkpoint_interval_s(save_s=300.0, mttf_s=100.0) == 100.0


def test_the_interval_is_near_the_best_one() -> None:
    """Daly's interval against a search over all of them, under his own expected time."""

    def seconds(interval: float) -> float:
        return expected_seconds(work_s=1e6, interval_s=interval, save_s=60.0, restart_s=60.0, mttf_s=11_000.0)

    best = min(map(seconds, range(100, 20_000, 10)))
    assert seconds(checkpoint_interval_s(save_s=60.0, mttf_s=11_000.0)) == pytest.approx(best, rel=1e-4)


def test_without_failures_only_saving_remains() -> None:
    found = expected_seconds(work_s=1000.0, interval_s=100.0, save_s=5.0, restart_s=5.0, mttf_s=1e12)
    assert found == pytest.approx(1000.0 * 105 / 100)


def test_a_cluster_that_fails_all_the_time_gets_nowhere() -> None:
    found = expected_seconds(work_s=1000.0, interval_s=1.0, save_s=1e6, restart_s=1e6, mttf_s=1.0)
    assert found == math.inf


def test_what_the_cluster_does_not_say_stays_open(dense: Ranking) -> None:
    found = budget(dense)
    step_s = 3.42  # 3.3 of compute and 0.12 of dp
    assert found.work_s == pytest.approx(1000 * step_s)
    assert found.gpu_hours == pytest.approx(1000 * step_s * 8 / 3600)
    assert found.tokens == 1000 * 64 * 4096
    assert found.checkpoint_bytes == dense.problem.model.num_parameters * 12  # fake: weights 4, optimizer 8
    assert found.expected_s == found.work_s
    assert found.overhead == 0
    open_keys = ("save_s", "mttf_s", "interval_s", "interval_steps", "failures", "cost")
    assert [getattr(found, key) for key in open_keys] == [None] * 6


def priced(ranking: Ranking, **keys: float) -> Budget:
    problem = replace(ranking.problem, cluster=replace(ranking.problem.cluster, **keys))
    return budget(replace(ranking, problem=problem))


def test_price_failures_and_storage_fill_it_in(dense: Ranking) -> None:
    # 8.03 B parameters * 12 bytes at 96.36 GB/s: 1 s; eight GPUs of 80,000 hours: one failure in 10,000 hours.
    storage = dense.problem.model.num_parameters * 12 / 1e9
    found = priced(dense, price_per_gpu_hour=2.5, mttf_hours_per_gpu=80_000.0, storage_gb_per_s=storage)
    assert found.save_s == pytest.approx(1.0)
    assert found.mttf_s == pytest.approx(36e6)
    assert found.interval_s == pytest.approx(math.sqrt(2 * 36e6), rel=1e-3)
    assert found.interval_steps == round(math.sqrt(2 * 36e6) / 3.42)
    assert found.failures == pytest.approx(3420 / 36e6, rel=1e-2)
    assert found.expected_s == pytest.approx(3420 * (1 + 2 / math.sqrt(2 * 36e6)), rel=1e-5)
    assert found.cost == pytest.approx(found.expected_s * 8 / 3600 * 2.5)
    assert 0 < found.overhead < 0.001


def test_a_price_alone_prices_the_work(dense: Ranking) -> None:
    assert priced(dense, price_per_gpu_hour=2.0).cost == pytest.approx(3420 * 8 / 3600 * 2.0)


def test_the_failures_of_llama_3(dense: Ranking) -> None:
    """419 interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, section 3.3.4): one in three hours."""
    per_gpu = 16_384 * 54 * 24 / 419
    cluster = replace(dense.problem.cluster, num_nodes=2048, mttf_hours_per_gpu=per_gpu)
    found = budget(replace(dense, problem=replace(dense.problem, cluster=cluster)))
    assert found.mttf_s == pytest.approx(54 * 86400 / 419)


def test_another_candidate_can_be_asked_for(dense: Ranking) -> None:
    other: Candidate = dense.candidates[2]
    assert other.cost is not None
    assert budget(dense, other).work_s == pytest.approx(1000 * other.cost.step_s)
