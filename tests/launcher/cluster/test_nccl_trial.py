"""Which settings are tried, and that chance, gains too small and gains at another's cost are not adopted."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest

from launcher.cluster import nccl, nccl_trial
from launcher.cluster.nccl_trial import candidates, cells, compare, fewest_rounds, p_value, parse
from launcher.cluster.nccl_variables import Fabric


def rounds(factor: float, *, noise: float = 0.01, count: int = 10, seed: int = 0) -> list[list[float]]:
    """Rounds of four cells that take 1 to 4 seconds times `factor`; what slows a round slows all settings."""
    shared, own = random.Random(7), random.Random(seed)
    slow = [shared.uniform(1, 2) for _ in range(count)]
    return [
        [cell * factor * s * math.exp(own.gauss(0, noise)) for cell in (1.0, 2.0, 3.0, 4.0)] for s in slow
    ]


def test_what_is_clearly_faster_is_adopted_whatever_slowed_the_rounds() -> None:
    outcome = compare([rounds(1.0), rounds(1.0, seed=1)], rounds(0.9, seed=2), num_candidates=3)
    assert outcome.verdict == "adopt"
    assert outcome.speedup == pytest.approx(1 / 0.9, rel=0.02) and outcome.p == 2**-10
    assert len(outcome.by_cell) == 4


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.0, 0.01, "within noise"),
        (0.99, 0.001, "no gain"),
        (0.97, 0.3, "within noise"),
        (1.1, 0.01, "within noise"),
    ],
)
def test_what_is_not_is_not(factor: float, noise: float, verdict: str) -> None:
    outcome = compare([rounds(1.0, noise=noise)], rounds(factor, noise=noise, seed=2), num_candidates=3)
    assert outcome.verdict == verdict


def test_a_gain_that_costs_another_size_is_not_adopted() -> None:
    tried = [[0.5 * a, 0.5 * b, 0.5 * c, 1.2 * d] for a, b, c, d in rounds(1.0, seed=2)]
    outcome = compare([rounds(1.0)], tried, num_candidates=1)
    assert outcome.verdict == "slows a part down" and "-16" in outcome.reason


def test_a_noisy_part_hides_no_other_that_gets_slower() -> None:
    leaps = [8.0, 0.25] * 5  # slower than all others on average, and nothing that noise would not do
    tried = [
        [leap * a, 0.5 * b, 0.2 * c, 1.2 * d]
        for leap, (a, b, c, d) in zip(leaps, rounds(1.0, seed=2), strict=True)
    ]
    outcome = compare([rounds(1.0)], tried, num_candidates=1)
    assert outcome.verdict == "slows a part down" and "-16" in outcome.reason


def test_both_copies_of_the_inherited_setting_have_to_be_beaten() -> None:
    unlucky, usual = rounds(1.2), rounds(1.0, seed=1)
    assert compare([unlucky], rounds(1.0, seed=2), num_candidates=1).verdict == "adopt"
    assert compare([unlucky, usual], rounds(1.0, seed=2), num_candidates=1).verdict != "adopt"


def test_chance_adopts_no_more_often_than_it_says() -> None:
    won = sum(
        compare(
            [rounds(1.0, noise=0.1, count=8, seed=2 * seed)],
            rounds(1.0, noise=0.1, count=8, seed=2 * seed + 1),
            num_candidates=1,
        ).verdict
        == "adopt"
        for seed in range(200)
    )
    assert won <= 0.05 * 200 * 1.8, "0.05 of them, and what 200 draws may be off"


def test_p_is_a_share_of_flips() -> None:
    assert p_value([-1.0, -1.0, -1.0]) == 1 / 8
    assert p_value([1.0, 1.0, 1.0]) == 1.0
    assert p_value([-3.0, 1.0]) == 2 / 4


def test_fewest_rounds_can_show_a_gain_and_a_loss() -> None:
    assert fewest_rounds(num_candidates=4, num_cells=1) == 7
    assert fewest_rounds(num_candidates=1, num_cells=4) == 7
    tried = [[0.5 * a, 0.5 * b, 0.5 * c, 1.2 * d] for a, b, c, d in rounds(1.0, count=7, seed=2)]
    assert compare([rounds(1.0, count=7)], tried, num_candidates=1).verdict == "slows a part down"


@pytest.mark.parametrize("fabric", [*get_args(Fabric), None])
def test_our_own_candidates_are_none_that_we_refuse(fabric: Fabric | None) -> None:
    found = candidates(fabric, device="cuda")
    assert bool(found) == (fabric not in ("efa", "gcp"))
    for candidate in found:
        verdicts = [f.verdict for f in nccl.lint(nccl.collect(candidate.environment, {}), fabric)]
        assert "refuse" not in verdicts and "NCCL" in candidate.source
    assert len(candidates(fabric, device="cpu")) == 2


def test_a_candidate_is_read_as_it_is_typed() -> None:
    assert parse("NCCL_ALGO=Tree").environment == {"NCCL_ALGO": "Tree"}
    several = parse("NCCL_SOCKET_NTHREADS=4,NCCL_NSOCKS_PERTHREAD=4")
    assert several.environment == {"NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"}
    assert several.name == "NCCL_SOCKET_NTHREADS=4,NCCL_NSOCKS_PERTHREAD=4"
    assert parse("NCCL_IB_HCA=mlx5_0,mlx5_1").environment == {"NCCL_IB_HCA": "mlx5_0,mlx5_1"}
    assert parse("A=x=y").environment == {"A": "x=y"}
    for wrong in ("Tree", "=Tree", "NCCL ALGO=1", ""):
        with pytest.raises(ValueError, match="is not NAME=VALUE"):
            parse(wrong)


def test_every_operation_is_timed_at_every_size() -> None:
    assert len(cells("cpu")) == 4 * len(nccl_trial.SIZES["cpu"])
    assert cells("cuda")[0] == ("all_reduce", 2**14)
