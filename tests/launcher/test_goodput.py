from __future__ import annotations

from typing import Any

import pytest

from launcher import goodput
from launcher.goodput import Ledger, ledger


def event(time: float, name: str, **details: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **details}


def steps(first: int, last: int, *, start: float, seconds: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"step": step, "step_time_s": seconds, "time": start + seconds * (step - first + 1)}
        for step in range(first, last + 1)
    ]


def total(found: Ledger | None) -> Ledger:
    assert found is not None
    return found


# Created at 0, queued for 10 s, up at 30, four steps, a save of 2 s, three more steps until 40; killed in the eighth,
# noticed at 41; started again at 45, up at 60; three steps repeated until 64, three new ones, the end at 71.
KILLED = [
    event(0, "created"),
    event(10, "launched"),
    event(30, "started", step=0),
    event(36, "checkpoint", step=4, seconds=5, stall_s=2),
    event(41, "failed"),
    event(45, "launched"),
    event(59, "lost", steps=3, seconds=3.0, until=40),
    event(60, "started", step=4),
    event(69, "checkpoint", step=10, seconds=2, stall_s=2),
    event(71, "finished"),
]
METRICS = [*steps(1, 4, start=30), *steps(5, 10, start=60)]


def test_every_second_of_a_killed_run_is_somewhere() -> None:
    found = total(ledger(KILLED, METRICS, now=1000))
    assert found.wall_s == 71
    assert (found.queue_s, found.paused_s, found.idle_s) == (10, 0, 4)
    assert found.init_s == 20 + 15
    assert found.productive_s == 10
    assert found.stall_s == 4
    assert found.lost_s == 3 + 1  # repeated steps, and from the last one to the failure
    assert (found.lost_steps, found.num_starts) == (3, 2)
    assert found.other_s == pytest.approx((41 - 30) + (71 - 60) - 10 - 4 - 4)
    assert found.goodput == pytest.approx(10 / (71 - 10)), "a queue is no fault of the run"
    assert found.record()["wall_s"] == 71


def test_a_run_under_way_is_counted_until_now() -> None:
    found = total(ledger(KILLED[:3], steps(1, 2, start=30), now=35))
    assert found.wall_s == 35
    assert found.productive_s == 2


def test_a_start_nobody_saw_the_end_of_ends_with_its_last_sign() -> None:
    unseen = [e for e in KILLED if e["event"] != "failed"]
    found = total(ledger(unseen, METRICS, now=1000))
    assert found.idle_s == 5  # from 40, the last lost step
    assert found.lost_s == 3
    assert found.wall_s == 71


def test_workers_without_a_launcher_start_when_they_say_so() -> None:
    events = [
        event(0, "created"),
        event(20, "started", step=0),
        event(23, "checkpoint", step=2, seconds=1, stall_s=1),
        event(40, "lost", steps=1, seconds=1.0, until=25),
        event(41, "started", step=2),
    ]
    found = total(ledger(events, [*steps(1, 2, start=20), *steps(3, 4, start=41)], now=44))
    assert found.num_starts == 2
    assert (found.init_s, found.idle_s) == (20, 41 - 25)
    assert found.wall_s == 44


def test_workers_without_a_launcher_say_when_they_began() -> None:
    events = [
        event(0, "created"),
        event(1, "submitted"),
        event(20, "started", step=0, begun=15),  # queued until then
        event(23, "checkpoint", step=2, seconds=1, stall_s=1),
        event(39, "resumed", step=2),  # by the next start, which nobody launched
        event(40, "started", step=2, begun=30),
        event(44, "stopped", step=4),
        event(60, "started", step=4, begun=43),  # by a clock that was set back
    ]
    found = total(ledger(events, [*steps(1, 2, start=20), *steps(3, 4, start=40)], now=61))
    assert (found.queue_s, found.num_starts) == (15, 3)
    assert found.init_s == 5 + 10 + 16
    assert found.idle_s == 30 - 23
    assert found.wall_s == 61


@pytest.mark.parametrize("name", ["submitted", "replanned", "paused", "restarting", "remedied"])
def test_what_a_launcher_does_between_starts_is_no_sign_of_life(name: str) -> None:
    unseen = [e for e in KILLED if e["event"] != "failed"]
    between = total(ledger([*unseen[:4], event(44, name), *unseen[4:]], METRICS, now=1000))
    assert between == total(ledger(unseen, METRICS, now=1000))


def test_an_export_and_a_rest_afterwards_do_not_count() -> None:
    events = [*KILLED, event(100, "exporting"), event(110, "exported")]
    assert total(ledger(events, METRICS, now=1000)).wall_s == 71


def test_nothing_is_told_before_the_first_start() -> None:
    assert ledger([event(0, "created")], [], now=5) is None
    assert ledger([], [], now=5) is None


def test_a_start_that_never_stepped_is_all_start() -> None:
    found = total(ledger([*KILLED[:2], event(15, "failed")], [], now=99))
    assert (found.init_s, found.lost_s, found.wall_s) == (5, 0, 15)


def test_what_will_be_repeated_is_told_before_it_is_forgotten() -> None:
    assert goodput.lost(steps(1, 7, start=30), step=4) == {"steps": 3, "seconds": 3.0, "until": 37}
    assert goodput.lost(steps(1, 4, start=30), step=4) is None
    assert goodput.lost([], step=0) is None


@pytest.mark.parametrize("end", ["stopped", "interrupted", "finished"])
def test_a_pause_that_was_asked_for_is_no_loss(end: str) -> None:
    events = [
        *(event(0, "created"), event(5, "launched"), event(10, "started", step=0), event(15, end)),
        *(event(9000, "launched"), event(9005, "started", step=4), event(9010, "finished")),
    ]
    found = total(ledger(events, [*steps(1, 4, start=10), *steps(5, 8, start=9005)], now=9999))
    assert (found.paused_s, found.idle_s, found.waited_s) == (8985, 0, 8990)
    assert found.wall_s == 9010
    assert found.goodput == pytest.approx(8 / 20)


def test_a_clock_goes_on_where_the_steps_end() -> None:
    events = [event(100, "created"), event(120, "launched"), event(130, "started", step=0)]
    clock = goodput.clock(events, steps(1, 4, start=130), now=140)
    assert clock is not None
    assert clock.tick(1.0, now=150) == pytest.approx(5 / 30)
    assert goodput.clock([], [], now=0) is None


def test_a_clock_agrees_with_the_ledger_behind_a_pause() -> None:
    events = [
        *(event(0, "created"), event(10, "launched"), event(20, "started", step=0), event(30, "stopped")),
        *(event(5000, "launched"), event(5010, "started", step=8)),
    ]
    before = steps(1, 8, start=20)
    clock = goodput.clock(events, before, now=5010)
    assert clock is not None
    after = [*before, *steps(9, 9, start=5010)]
    assert clock.tick(1.0, now=5011) == pytest.approx(total(ledger(events, after, now=5011)).goodput)
