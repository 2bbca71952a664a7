from __future__ import annotations

import pytest

from launcher.errors import CheckFailed
from launcher.verbs.checks import check_loss_falls, compare_losses


def test_loss_must_fall() -> None:
    assert check_loss_falls([3.0, 2.0, 1.0]) == "loss fell from 3.0000 to 1.0000"
    with pytest.raises(CheckFailed, match=r"from 1\.0000 to 1\.0000"):
        check_loss_falls([1.0, 0.5, 1.0])
    with pytest.raises(CheckFailed):
        check_loss_falls([1.0, float("nan")])


def test_losses_must_be_equal_to_the_last_bit() -> None:
    first = {1: 3.0, 2: 2.0, 3: 1.0}
    assert compare_losses(first, {2: 2.0, 3: 1.0}, after=1) == 2
    with pytest.raises(CheckFailed, match="step 3"):
        compare_losses(first, {2: 2.0, 3: 1.0000000001}, after=1)
    with pytest.raises(CheckFailed, match="step 2 gave loss None"):
        compare_losses(first, {3: 1.0}, after=1)
