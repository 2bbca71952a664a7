"""Where DeepSpeed puts its ranks is where the plan says."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.spec import Plan


@pytest.mark.parametrize("degrees", [(2, 2, 2), (4, 1, 2), (2, 3, 1), (1, 2, 4)], ids=str)
def test_ranks_stand_in_the_order_of_the_plan(degrees: tuple[int, int, int]) -> None:
    from strategies.deepspeed import grid

    dp, tp, pp = degrees
    plan = Plan(strategy="deepspeed", dp=dp, tp=tp, pp=pp)
    topology = grid.topology_of(plan)
    for rank in range(plan.world_size):
        place = topology.get_coord(rank)
        assert (place.model, place.data, place.pipe) == tuple(
            plan.coordinate(axis, rank) for axis in ("tp", "dp", "pp")
        )


def test_groups_are_those_of_the_plan(built: dict[str, Any]) -> None:
    assert built["tensor"]["place"] == [1, 0, 0]
    assert built["first"]["place"] == [1, 0, 0]
    assert built["last"]["place"] == [0, 1, 1]


def test_forgotten_groups_are_opened_anew(built: dict[str, Any]) -> None:
    """Every case above was built in one process, one after the other."""
    assert built["data"]["place"] is None
