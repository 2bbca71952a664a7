from __future__ import annotations

from typing import Any

import pytest

from launcher.cluster import switches
from launcher.cluster.spec import Link, Switch

NETWORK = Link(name="network", size=None, gb_per_s=50.0, latency_us=15.0)


def test_a_tree_keeps_hosts_at_its_leaves_only(clusters: dict[str, Any]) -> None:
    tree = switches.parse(clusters["recorded_tree"]["topology"])
    assert not tree.blocks
    assert {switch.name: (switch.hosts, switch.switches) for switch in tree.switches} == {
        "leaf0": (("node0", "node1"), ()),
        "leaf1": (("node2", "node3"), ()),
        "spine0": ((), ("leaf0", "leaf1")),
    }
    assert switches.heights(tree.switches) == {"leaf0": 0, "leaf1": 0, "spine0": 1}


def test_blocks_of_blocks_are_read() -> None:
    text = (
        "BlockName=b1 BlockIndex=0 Nodes=n[1-2] BlockSize=2\nBlockName=b2 BlockIndex=1 Nodes=n[3-4] BlockSize=2\n"
        "AggregatedBlock=b[1-2] BlockIndex=2 Nodes=n[1-4] BlockSize=4\n"
    )
    tree = switches.parse(text)
    assert tree.blocks
    assert switches.order(["n4", "n2", "n1"], tree.switches, group=2) == ("n1", "n2", "n4")


def test_a_host_under_two_switches_stands_once() -> None:
    tree = [Switch(name="a", hosts=("x", "y")), Switch(name="b", hosts=("y", "z"))]
    assert switches.order(["z", "y", "x"], tree) == ("x", "y", "z")


def test_without_switches_names_decide() -> None:
    assert switches.order(["n10", "n9"], []) == ("n9", "n10")
    assert switches.tiers((NETWORK,), (), gpus_per_node=8) == (NETWORK,)


def test_uplinks_at_full_rate_add_no_tier() -> None:
    tree = [
        Switch(name="a", hosts=("x",)),
        Switch(name="b", hosts=("y",)),
        Switch(name="top", switches=("a", "b")),
    ]
    assert switches.tiers((NETWORK,), tree, gpus_per_node=8) == (NETWORK,)


def test_one_gpu_alone_still_reaches_the_full_rate() -> None:
    tree = [
        Switch(name="a", hosts=("x",), oversubscription=4),
        Switch(name="b", hosts=("y",), oversubscription=4),
        Switch(name="top", switches=("a", "b")),
    ]
    _, across = switches.tiers((NETWORK,), tree, gpus_per_node=8)
    assert across.gb_per_s * across.shared_by == NETWORK.gb_per_s


def test_uplinks_cannot_be_faster_than_what_they_carry() -> None:
    with pytest.raises(ValueError, match=r"cluster.switches.oversubscription=0.5 must be at least 1"):
        Switch(name="a", oversubscription=0.5)
