"""Collectives by hand calculation, and the links that a group of ranks spans."""

from __future__ import annotations

import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.collectives import Group, group_of, groups_of
from strategies.spec import Plan

CLUSTER = ClusterSpec(
    name="c",
    num_nodes=4,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
    links=(
        Link(size=8, gb_per_s=300.0, latency_us=10.0, efficiency=0.5),
        Link(size=None, gb_per_s=25.0, latency_us=20.0, efficiency=0.8),
    ),
    host_memory_gib=1000.0,
)
GROUP = Group(size=8, bytes_per_s=1e9, latency_s=1e-3, ring_s=7e-3)


def test_volumes_are_those_of_rings() -> None:
    assert GROUP.all_gather_s(8e9) == pytest.approx(7 + 7e-3)
    assert GROUP.all_reduce_s(8e9) == pytest.approx(2 * (7 + 3e-3))
    assert GROUP.all_to_all_s(8e9) == pytest.approx(7 + 7e-3)
    assert GROUP.send_s(2e9) == pytest.approx(2 + 1e-3)


def test_latency_is_paid_by_every_call_and_volume_once() -> None:
    assert GROUP.all_gather_s(8e9, calls=10) == pytest.approx(7 + 70e-3)
    assert GROUP.all_reduce_s(8e9, calls=10) == pytest.approx(2 * (7 + 30e-3))


def test_a_ring_has_a_hop_less_than_ranks_each_over_its_own_tier() -> None:
    """Inside a node 10 us a hop, between nodes 20 us."""
    assert group_of(CLUSTER, size=8, stride=1).ring_s == pytest.approx(7 * 10e-6)
    assert group_of(CLUSTER, size=4, stride=8).ring_s == pytest.approx(3 * 20e-6)
    assert group_of(CLUSTER, size=16, stride=1).ring_s == pytest.approx(14 * 10e-6 + 1 * 20e-6)
    assert group_of(CLUSTER, size=16, stride=2).ring_s == pytest.approx(12 * 10e-6 + 3 * 20e-6)


def test_a_tree_is_used_only_where_it_is_shorter() -> None:
    group = group_of(CLUSTER, size=9, stride=1)  # seven hops of 10 us and one of 20, or four levels of 20
    assert group.all_reduce_s(0) == pytest.approx(2 * 80e-6)
    assert group_of(CLUSTER, size=3, stride=4).all_reduce_s(0) == pytest.approx(2 * 30e-6)


def test_one_rank_has_nobody_to_talk_to() -> None:
    alone = group_of(CLUSTER, size=1, stride=1)
    assert (
        alone.all_gather_s(1e9)
        == alone.all_reduce_s(1e9)
        == alone.all_to_all_s(1e9)
        == alone.send_s(1e9)
        == 0
    )


def test_a_group_inside_a_node_uses_the_fast_links() -> None:
    group = group_of(CLUSTER, size=4, stride=2)
    assert group.bytes_per_s == pytest.approx(150e9)
    assert group.latency_s == pytest.approx(10e-6)


def test_across_nodes_the_neighbours_drive_their_cards_together() -> None:
    assert group_of(CLUSTER, size=4, stride=8).bytes_per_s == pytest.approx(20e9)  # one member a node
    assert group_of(CLUSTER, size=16, stride=2).bytes_per_s == pytest.approx(80e9)  # four members a node
    assert group_of(CLUSTER, size=32, stride=1).bytes_per_s == pytest.approx(
        150e9
    )  # the fast links are the limit


def test_the_rank_order_decides_who_is_near() -> None:
    plan = Plan(strategy="s", dp=4, tp=8)
    near = groups_of(CLUSTER, plan)
    assert near["tp"].bytes_per_s == pytest.approx(150e9)
    assert near["dp"].bytes_per_s == pytest.approx(20e9)
    far = groups_of(CLUSTER, Plan(strategy="s", dp=4, tp=8, rank_order=("dp", "cp", "tp", "pp")))
    assert far["tp"].bytes_per_s < near["tp"].bytes_per_s
    assert far["dp"].bytes_per_s == pytest.approx(150e9)


def test_states_are_shared_over_dp_and_cp() -> None:
    groups = groups_of(CLUSTER, Plan(strategy="s", dp=4, cp=2, tp=2, pp=2))
    assert groups["state"].size == 8
    assert {name: groups[name].size for name in ("tp", "cp", "dp", "pp", "ep")} == {
        "tp": 2,
        "cp": 2,
        "dp": 4,
        "pp": 2,
        "ep": 1,
    }
