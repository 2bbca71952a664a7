from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from launcher.decode import decode, encode
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"outer.inner.width={self.width} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    limit: int | None = None
    items: tuple[Inner, ...] = ()
    peak: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


GOOD = {"name": "x", "inner": {"width": 3}}


def test_round_trip_is_exact() -> None:
    outer = decode(
        Outer, {**GOOD, "items": [{"width": 1}, {"width": 2}], "peak": {"bf16": 3}, "extra": {"a": {"b": 1}}}
    )
    assert outer.items == (Inner(width=1), Inner(width=2))
    assert decode(Outer, encode(outer)) == outer


def test_numbers_in_yaml_spelling() -> None:
    assert decode(Inner, {"width": 2.0, "rate": "3e-4"}) == Inner(width=2, rate=3e-4)
    assert isinstance(decode(Inner, {"width": 2, "rate": 1}).rate, float)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nmae": "y"}, "unknown key 'nmae'; did you mean 'name'?"),
        ({"inner": {"width": 1, "widht": 2}}, "unknown key 'inner.widht'; did you mean 'width'?"),
        ({"inner": {"rate": 1.0}}, "missing key 'inner.width'; set it to a whole number"),
        ({"inner": {"width": "three"}}, "inner.width=three is not a whole number"),
        ({"inner": {"width": True}}, "inner.width=True is not a whole number"),
        ({"inner": {"width": 1.5}}, "inner.width=1.5 is not a whole number"),
        ({"inner": {"width": 0}}, "outer.inner.width=0 must be at least 1"),
        ({"inner": None}, "inner=None must be a group of keys"),
        ({"kind": "c"}, "kind=c is not accepted; use one of a, b"),
        ({"flag": 1}, "flag=1 is not true or false"),
        ({"name": None}, "name=null is not a text"),
        ({"limit": "all"}, "limit=all is not a whole number"),
        ({"items": {"width": 1}}, "items={'width': 1} must be a list"),
        ({"items": [{"width": 1}, {"wide": 1}]}, "unknown key 'items[1].wide'"),
        ({"peak": {"bf16": "fast"}}, "peak.bf16=fast is not a number"),
    ],
)
def test_faults_name_key_value_and_remedy(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Outer, {**GOOD, **change})
    assert sentence in str(caught.value)
