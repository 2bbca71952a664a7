from __future__ import annotations

from typing import Any

import pytest

from launcher.checkpoint import CheckpointPolicy
from launcher.decode import decode
from launcher.errors import ConfigError


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"keep_last": 0}, "checkpoint.keep_last=0 must be at least 1"),
        ({"keep_last_fast": 0}, "checkpoint.keep_last_fast=0 must be at least 1"),
        ({"interval": -5}, "checkpoint.interval=-5 must not be negative"),
        ({"interval": "often"}, "checkpoint.interval=often is not a whole number or auto"),
        ({"interval": None}, "checkpoint.interval=null is not accepted; give a whole number or auto"),
        ({"keep_every": -1}, "checkpoint.keep_every=-1 must not be negative"),
        ({"grace_s": 0}, "checkpoint.grace_s=0.0 must be above 0"),
        ({"mttf_hours": -1}, "checkpoint.mttf_hours=-1.0 must be above 0"),
        ({"on_failed_save": "hope"}, "checkpoint.on_failed_save=hope is not accepted"),
        ({"fast_dir": "scratch"}, "checkpoint.fast_dir=scratch must be an absolute path"),
    ],
)
def test_refusals_name_the_key(record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(CheckpointPolicy, record, "checkpoint")
    assert sentence in str(caught.value)


def test_the_interval_is_a_number_or_a_word() -> None:
    assert decode(CheckpointPolicy, {"interval": 5}).interval == 5
    assert decode(CheckpointPolicy, {"interval": "auto"}).interval == "auto"
