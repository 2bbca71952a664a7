from __future__ import annotations

import pytest

from launcher.monitor.spikes import SpikeRule


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_always_bad(loss: float) -> None:
    assert SpikeRule(None).fault(loss) == f"is {loss}"


def test_without_a_factor_no_loss_is_too_high() -> None:
    rule = SpikeRule(None)
    assert [rule.fault(loss) for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e9)] == [None] * 7


def test_a_leap_over_the_median_is_bad_and_not_remembered() -> None:
    rule = SpikeRule(2.0)
    assert not any(rule.fault(loss) for loss in (9.0, 1.0, 1.0, 1.0, 1.0, 1.9))
    for _ in range(20):  # else the spikes would become the rule
        fault = rule.fault(2.5)
        assert fault is not None and "supervise.spike_factor=2 times the median 1.0000" in fault
    assert rule.fault(1.5) is None


def test_the_first_steps_of_a_start_have_no_median_yet() -> None:
    rule = SpikeRule(2.0)
    assert [rule.fault(loss) for loss in (1.0, 9.0, 1.0, 9.0)] == [None] * 4
