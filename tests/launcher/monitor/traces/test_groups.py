"""Groups by the plan's own words, and gloo's events given theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from launcher.monitor.traces.groups import ASIDE, NAME, attributed, named
from strategies.spec import BESIDE, Plan


def group(name: str, *ranks: int, described: str = "undefined") -> dict[str, Any]:
    return {"pg_name": name, "pg_desc": described, "ranks": list(ranks)}


def event(name: str, start: float, *, thread: int) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": 1.0, "tid": thread, "args": {"Ev Idx": 1}}


def groups_of(events: Sequence[Mapping[str, Any]]) -> list[str | None]:
    return [told.get("args", {}).get(NAME) for told in events]


def test_a_group_is_called_by_the_degrees_in_which_its_ranks_differ() -> None:
    plan = Plan(strategy="megatron", tp=2, cp=2, dp=2, pp=2)
    configs = [
        group("0", *range(16)),
        group("1", 0, 1),
        group("2", 0, 2),
        group("3", 0, 4),
        group("4", 0, 2, 4, 6),
        group("5", 0, 8),
        group("6", 3),
        group("7", 0, 1, described=BESIDE),
    ]
    assert named(configs, plan) == {
        **{
            "0": "tp-cp-dp-pp",
            "1": "tp",
            "2": "cp",
            "3": "dp",
            "4": "cp-dp",
            "5": "pp",
            "6": ASIDE,
            "7": ASIDE,
        },
        "pp": "pp",
    }


def test_the_order_of_ranks_decides() -> None:
    outermost = Plan(strategy="megatron", dp=2, pp=2, rank_order=("tp", "cp", "pp", "dp"))
    found = named([group("1", 0, 1), group("2", 0, 2)], outermost)
    assert (found["1"], found["2"]) == ("pp", "dp")


@pytest.mark.parametrize(
    ("ranks", "described", "name"),
    [
        ((0, 1), "undefined", "ep"),  # neighbours hold the experts between them
        ((0, 2), "undefined", "dp"),  # and those apart the same ones
        ((0, 1, 2, 3), "undefined", "dp"),
        ((0, 1, 2, 3), "EXPERT_MODEL_PARALLEL_GROUP", "ep"),
        ((0, 2), "EXPERT_DATA_PARALLEL_GROUP", "dp"),
    ],
)
def test_ranks_that_share_experts_among_those_of_dp(
    ranks: tuple[int, ...], described: str, name: str
) -> None:
    plan = Plan(strategy="megatron", dp=4, ep=2)
    assert named([group("1", *ranks, described=described)], plan)["1"] == name


def test_events_get_the_groups_in_the_order_in_which_they_were_asked_for() -> None:
    events = [
        event("gloo:all_gather", 1.0, thread=7),
        event("gloo:all_reduce", 5.0, thread=8),
        event("gloo:all_reduce", 3.0, thread=7),
        event("aten::mm", 2.0, thread=1),
        {"ph": "M", "name": "process_name"},
    ]
    asked = [("gloo:all_reduce", "1"), ("gloo:all_gather", "1"), ("gloo:all_reduce", "2")]
    found = attributed(events, asked, Plan(strategy="accelerate", dp=2))
    assert groups_of(found) == ["1", "2", "1", None, None]
    assert found[0]["args"] == {"Ev Idx": 1, NAME: "1"}
    assert found[3:] == events[3:]


def test_a_thread_that_is_overtaken_once_keeps_its_group() -> None:
    # The second one was asked for behind the first, and began before it.
    begun = [(1.0, 8), (1.1, 7), (2.0, 7), (3.0, 8), (4.0, 7), (5.0, 8)]
    asked = [("gloo:all_reduce", name) for name in "121212"]
    events = [event("gloo:all_reduce", start, thread=thread) for start, thread in begun]
    assert groups_of(attributed(events, asked, Plan(strategy="megatron", tp=2, dp=2))) == list("211212")


def test_what_the_recorder_forgot_shifts_nothing() -> None:
    events = [event("gloo:all_reduce", float(at), thread=at) for at in range(3)]
    asked = [("gloo:all_reduce", "1"), ("gloo:all_reduce", "2")]
    assert groups_of(attributed(events, asked, Plan(strategy="fake", dp=2))) == [None, "1", "2"]


def test_messages_are_the_pipelines_unless_another_group_may_send_some() -> None:
    events = [event("gloo:send", 1.0, thread=1), event("gloo:recv", 2.0, thread=1)]
    assert groups_of(attributed(events, [], Plan(strategy="megatron", dp=1, pp=2))) == ["pp", "pp"]
    assert groups_of(attributed(events, [], Plan(strategy="megatron", dp=1, pp=2, cp=2))) == [None, None]
