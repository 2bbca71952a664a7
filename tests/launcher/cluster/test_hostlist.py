from __future__ import annotations

import pytest

from launcher.cluster.hostlist import expand, natural


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("node0", ("node0",)),
        ("node[0-2,5]", ("node0", "node1", "node2", "node5")),
        ("gpu-[008-010]", ("gpu-008", "gpu-009", "gpu-010")),
        ("a,b[1-2],c", ("a", "b1", "b2", "c")),
        ("r[1-2]n[0-1]x", ("r1n0x", "r1n1x", "r2n0x", "r2n1x")),
        ("login[a,b]", ("logina", "loginb")),
    ],
)
def test_short_forms_are_written_out(text: str, names: tuple[str, ...]) -> None:
    assert expand(text) == names


def test_an_open_bracket_is_named() -> None:
    with pytest.raises(ValueError, match=r"'node\[0-2' is not a list of hosts"):
        expand("node[0-2")


def test_ten_follows_nine() -> None:
    assert sorted(["n10", "n9", "m", "10"], key=natural) == ["10", "m", "n9", "n10"]
