"""A run of one rank, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class Alone:
    """Every question to the other ranks has this rank's answer."""

    rank, world_size, local_rank = 0, 1, 0

    def barrier(self) -> None: ...

    def any(self, flag: bool) -> bool:
        return flag

    def maximum(self, value: float) -> float:
        return value

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def separate(self) -> Alone:
        return self


@pytest.fixture
def alone() -> Callable[[], Any]:
    """`alone()` stands for `launcher.ranks.Ranks`."""
    return Alone
