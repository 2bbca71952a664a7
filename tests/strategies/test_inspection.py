"""What one rank holds, as its adapter reports it."""

from __future__ import annotations

from strategies.inspection import Inspection


def test_states_are_the_three_parts_that_a_step_leaves_behind() -> None:
    found = Inspection(
        parameters=10, weight_bytes=20, gradient_bytes=40, optimizer_bytes=120, working_bytes=1000
    )
    assert found.state_bytes == 180


def test_what_was_not_found_out_is_no_number() -> None:
    found = Inspection(parameters=1, weight_bytes=2, gradient_bytes=4, optimizer_bytes=12)
    assert (found.working_bytes, found.notes) == (None, ())
