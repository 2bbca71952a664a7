from __future__ import annotations

from launcher.verbs.show import compare


def test_predicted_stands_beside_measured_where_both_exist() -> None:
    rows = compare({"step_s": 2.0, "memory_bytes": 100}, {"step_s": 4.0, "memory_bytes": 200})
    assert rows["step_s"]["predicted_over_measured"] == 0.5
    assert rows["memory_bytes"] == {"predicted": 100, "measured": 200, "predicted_over_measured": 0.5}
    assert compare({"step_s": 2.0}, {"step_s": None}) == {}
    assert compare({"step_s": 2.0}, None) == {}
