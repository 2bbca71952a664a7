from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import SuperviseConfig
from launcher.heartbeat import Beat, Heart, Phase
from launcher.supervise.watch import Stall, Watch, culprit, step_reached

POLICY = SuperviseConfig(step_timeout_s=10, init_timeout_s=100)


def stall(*where: tuple[Phase, int], unreported: tuple[int, ...] = ()) -> Stall:
    beats = tuple(
        Beat(rank=rank, host="h", pid=1, phase=phase, step=step, count=1)
        for rank, (phase, step) in enumerate(where)
    )
    return Stall(silent_s=11, limit_s=10, key="supervise.step_timeout_s", beats=beats, unreported=unreported)


def test_a_rank_that_beats_is_never_late(tmp_path: Path) -> None:
    watch = Watch(tmp_path, POLICY, world_size=1, now=0)
    heart = Heart(tmp_path, rank=0)
    for second in range(0, 300, 9):
        heart.beat("stepping", second)
        assert watch.look(second) is None


def test_the_loop_has_the_short_limit_and_all_else_the_long_one(tmp_path: Path) -> None:
    watch = Watch(tmp_path, POLICY, world_size=2, now=0)
    hearts = [Heart(tmp_path, rank=rank) for rank in range(2)]
    assert watch.look(99) is None
    assert watch.look(198) is None  # 99 s after the first beats were seen
    hearts[0].beat("stepping", 1)
    hearts[1].beat("saving", 1)
    assert watch.look(199) is None
    assert watch.look(209) is None
    found = watch.look(209.5)
    assert found is not None
    assert (found.key, found.limit_s, found.silent_s) == ("supervise.step_timeout_s", 10, 10.5)
    hearts[0].beat("saving", 1)
    assert watch.look(210) is None


def test_a_rank_that_never_reports_is_late_in_the_end(tmp_path: Path) -> None:
    watch = Watch(tmp_path, POLICY, world_size=2, now=0)
    Heart(tmp_path, rank=0)
    assert watch.look(50) is None
    found = watch.look(101)
    assert found is not None
    assert (found.key, found.unreported) == ("supervise.init_timeout_s", (1,))


def test_looks_are_close_enough_to_be_within_a_tenth(tmp_path: Path) -> None:
    for timeout in (1.0, 10.0, 600.0):
        watch = Watch(tmp_path, SuperviseConfig(step_timeout_s=timeout), world_size=1, now=0)
        assert watch.interval_s < timeout / 10


@pytest.mark.parametrize(
    ("found", "stopped", "busy", "rank", "why"),
    [
        (stall(("stepping", 4), ("stepping", 4)), [1], {}, 1, "its process is stopped"),
        (stall(("starting", 0), unreported=(1,)), [], {}, 1, "it has not reported"),
        (
            stall(("stepping", 5), ("stepping", 4)),
            [],
            {1: "data.py:7"},
            1,
            "it is stepping after step 4 at data.py:7, where rank 0 is stepping after step 5",
        ),
        (stall(("saving", 4), ("stepping", 4)), [], {}, 0, "it is saving after step 4"),
        (stall(("stepping", 4), ("stepping", 4)), [], {1: "x.py:3"}, 1, "it is at x.py:3, the others wait"),
        (stall(("stepping", 4), ("stepping", 4)), [], {0: "a.py:1", 1: "b.py:2"}, 0, "it is silent longest"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(
    found: Stall, stopped: list[int], busy: dict[int, str], rank: int, why: str
) -> None:
    named = culprit(found, stopped=stopped, busy=busy)
    assert named.rank == rank
    assert named.why.startswith(why)


def test_the_furthest_rank_says_how_far_a_start_came() -> None:
    assert step_reached(()) == 0
    assert step_reached(stall(("stepping", 4), ("saving", 7)).beats) == 7


def test_ranks_are_as_quiet_as_the_last_of_them(tmp_path: Path) -> None:
    watch = Watch(tmp_path, POLICY, world_size=3, now=0)
    hearts = [Heart(tmp_path, rank=rank) for rank in range(3)]
    watch.look(1)
    hearts[1].beat("stepping", 1)
    watch.look(2)
    assert (watch.last_beat(range(1)), watch.last_beat(range(0, 2)), watch.last_beat(range(2, 3))) == (
        1,
        2,
        1,
    )
