from __future__ import annotations

import pytest

from launcher.verbs.show import compare, state


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "unknown"),
        (["created"], "created"),
        (["created", "launched"], "starting"),
        (["created", "launched", "started", "checkpoint"], "running"),
        (["created", "launched", "started", "checkpoint", "finished"], "finished"),
        (["created", "launched", "started", "stopped", "interrupted"], "interrupted"),
        (["created", "launched", "failed", "launched", "resumed", "started"], "running"),
        (["created", "launched", "started", "failed"], "failed"),
    ],
)
def test_state_is_the_last_telling_event(events: list[str], expected: str) -> None:
    assert state([{"event": event} for event in events]) == expected


def test_predicted_stands_beside_measured_where_both_exist() -> None:
    rows = compare({"step_s": 2.0, "memory_bytes": 100}, {"step_s": 4.0, "memory_bytes": 200})
    assert rows["step_s"]["predicted_over_measured"] == 0.5
    assert rows["memory_bytes"] == {"predicted": 100, "measured": 200, "predicted_over_measured": 0.5}
    assert compare({"step_s": 2.0}, {"step_s": None}) == {}
    assert compare({"step_s": 2.0}, None) == {}
