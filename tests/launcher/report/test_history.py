"""Where the time went: every second of a run is in one stretch, and steps behind the last checkpoint are lost."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.report.history import (
    DOWN,
    LOST,
    SAVING,
    STARTING,
    STEPS,
    history_chart,
    seconds_by_kind,
    spans_of,
)


def event(time: float, name: str, **details: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **details}


KILLED = [
    event(90, "created"),
    event(100, "launched"),
    event(110, "started"),
    event(132, "checkpoint", step=10, seconds=9.0, stall_s=2.0),
    event(140, "failed", message="rank 1 was killed"),
    event(145, "launched"),
    event(150, "resumed"),
    event(152, "started"),
    event(170, "finished"),
]


def test_a_killed_run_by_hand() -> None:
    spans = spans_of(KILLED)
    assert [(span.kind, span.start_s, span.end_s) for span in spans] == [
        (STARTING, 0, 10),
        (STEPS, 10, 30),
        (SAVING, 30, 32),
        (LOST, 32, 40),
        (DOWN, 40, 45),
        (STARTING, 45, 52),
        (STEPS, 52, 70),
    ]
    assert spans[3].note == "rank 1 was killed"
    assert seconds_by_kind(spans) == {STEPS: 38, STARTING: 17, SAVING: 2, LOST: 8, DOWN: 5}


def test_a_run_that_goes_on_ends_where_it_was_last_heard_of() -> None:
    assert spans_of(KILLED[:4], [{"time": 150.0}])[-1].end_s == 50
    assert spans_of(KILLED[:4])[-1].end_s == 32


def test_a_restart_without_a_launch_of_its_own_counts_as_down() -> None:
    spans = spans_of([*KILLED[1:5], event(150, "started"), event(160, "finished")])
    assert [(span.kind, span.seconds) for span in spans[-2:]] == [(DOWN, 10), (STEPS, 10)]


def test_workers_that_nobody_launched_say_when_they_began() -> None:
    """As Slurm and bare torchrun start them; the end of the first start was seen by nobody."""
    events = [
        event(50, "created"),
        event(110, "started", begun=100.0),
        event(130, "checkpoint", step=10, stall_s=1.0),
        event(170, "lost", steps=5, seconds=8.0, until=141.0),
        event(171, "started", begun=160.0),
        event(190, "finished"),
    ]
    told = [(span.kind, span.start_s, span.end_s) for span in spans_of(events, [{"time": 141.0}])]
    assert told == [
        (STARTING, 0, 10),
        (STEPS, 10, 29),
        (SAVING, 29, 30),
        (LOST, 30, 41),
        (DOWN, 41, 60),
        (STARTING, 60, 71),
        (STEPS, 71, 90),
    ]


def test_an_export_is_no_part_of_a_run() -> None:
    exported = [event(200, "exporting"), event(220, "exported")]
    assert spans_of([*KILLED, *exported]) == spans_of(KILLED)


def test_nothing_happened_yet() -> None:
    assert spans_of([event(1, "created")]) == ()
    assert history_chart([("a", ())]) == ""


@pytest.mark.parametrize("count", [1, 4000])
def test_the_chart_has_a_lane_a_run_and_stays_small(count: int) -> None:
    many = [event(0, "launched"), event(1, "started")]
    many += [event(2 + i, "checkpoint", step=i, stall_s=0.3) for i in range(count)]
    html = history_chart([("one", spans_of(KILLED)), ("two", spans_of(many))])
    assert "one" in html
    assert "two" in html
    assert "rank 1 was killed" in html
    assert len(html) < 400_000
