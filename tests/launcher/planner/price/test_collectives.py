"""Collectives by hand calculation and against published measurements, and the links that a group of ranks spans."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import yaml

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.decode import decode
from launcher.planner.price.collectives import Group, group_of, groups_of
from strategies.spec import Plan

NODE = Link(size=8, gb_per_s=300.0, latency_us=10.0, efficiency=0.5)
NETWORK = Link(size=None, gb_per_s=25.0, latency_us=20.0, efficiency=0.8)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=4,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
    links=(NODE, NETWORK),
    host_memory_gib=1000.0,
)
GB = 1e9
MIB, GIB = 2**20, 2**30


def with_links(*links: Link, nodes: int = 4, gpus_per_node: int = 8) -> ClusterSpec:
    return replace(CLUSTER, links=links, num_nodes=nodes, gpus_per_node=gpus_per_node)


def preset(name: str, *, nodes: int = 1, **changes: Any) -> ClusterSpec:
    text = (resources.files("hydra_configs") / "cluster" / f"{name}.yaml").read_text("utf-8")
    values = yaml.safe_load(text)
    values.pop("defaults", None)
    return replace(decode(ClusterSpec, values, "cluster"), num_nodes=nodes, **changes)


def neighbours(cluster: ClusterSpec, size: int) -> Group:
    return group_of(cluster, size=size, stride=1)


def test_volumes_are_those_of_rings() -> None:
    group = neighbours(CLUSTER, 8)
    assert group.all_gather_s(8 * GB) == pytest.approx(7 / 150 + 70e-6)
    assert group.all_reduce_s(8 * GB) == pytest.approx(2 * (7 / 150 + 70e-6))
    assert group.all_to_all_s(8 * GB) == pytest.approx(7 / 150 + 40e-6)
    assert group.send_s(8 * GB) == pytest.approx(8 / 150 + 10e-6)


def test_latency_is_paid_by_every_call_and_volume_once() -> None:
    group = neighbours(CLUSTER, 8)
    assert group.all_gather_s(8 * GB, calls=10) == pytest.approx(7 / 150 + 700e-6)
    assert group.all_reduce_s(8 * GB, calls=10) == pytest.approx(2 * (7 / 150 + 700e-6))
    assert group.all_to_all_s(8 * GB, calls=10) == pytest.approx(7 / 150 + 400e-6)


def test_a_ring_has_a_step_less_than_ranks_each_over_its_own_tier() -> None:
    """Inside a node 10 us a step, between nodes 20 us."""
    for size, stride, expected in ((8, 1, 70), (4, 8, 60), (16, 1, 140 + 20), (16, 2, 120 + 60)):
        assert group_of(CLUSTER, size=size, stride=stride).all_gather_s(0) == pytest.approx(expected * 1e-6)


def test_a_tree_is_a_chain_in_the_node_and_doubles_between_nodes() -> None:
    assert neighbours(CLUSTER, 32).all_reduce_s(0) == pytest.approx(2 * (70 + 2 * 20) * 1e-6)
    flat = with_links(replace(NETWORK, latency_us=10.0))
    assert neighbours(flat, 32).all_reduce_s(0) == pytest.approx(2 * 5 * 10e-6)
    assert neighbours(flat, 2).all_reduce_s(0) == pytest.approx(2 * 10e-6)


def test_a_collective_starts_once_and_a_message_half_as_late() -> None:
    cluster = with_links(replace(NODE, start_us=100.0), replace(NETWORK, start_us=300.0))
    assert neighbours(cluster, 8).all_gather_s(0) == pytest.approx((100 + 70) * 1e-6)
    assert neighbours(cluster, 8).all_reduce_s(0) == pytest.approx((100 + 140) * 1e-6)
    assert neighbours(cluster, 16).all_gather_s(0) == pytest.approx((300 + 160) * 1e-6)
    assert neighbours(cluster, 8).send_s(0) == pytest.approx((50 + 10) * 1e-6)


def test_small_messages_start_sooner_at_a_tenth_of_the_bandwidth() -> None:
    group = neighbours(with_links(replace(NODE, start_us=100.0, small_latency=0.3)), 8)
    assert group.all_gather_s(8e3) == pytest.approx(0.3 * 170e-6 + 7e3 / 15e9)
    assert group.all_reduce_s(8e3) == pytest.approx(0.3 * 240e-6 + 14e3 / 15e9)
    assert group.all_gather_s(8 * GB) == pytest.approx(170e-6 + 7 / 150)


def test_one_rank_has_nobody_to_talk_to() -> None:
    alone = neighbours(CLUSTER, 1)
    assert (
        alone.all_gather_s(GB)
        == alone.all_reduce_s(GB)
        == alone.all_to_all_s(GB, copies=8)
        == alone.send_s(GB)
        == 0
    )


def test_a_group_inside_a_node_uses_the_fast_links() -> None:
    group = group_of(CLUSTER, size=4, stride=2)
    assert (group.nodes, group.tier) == (1, "links[0]")
    assert group.bytes_per_s == pytest.approx(150e9)
    assert group.latency_s == pytest.approx(10e-6)


def test_across_nodes_the_neighbours_drive_their_cards_together() -> None:
    assert group_of(CLUSTER, size=4, stride=8).bytes_per_s == pytest.approx(20e9)  # one member a node
    assert group_of(CLUSTER, size=16, stride=2).bytes_per_s == pytest.approx(80e9)  # four members a node
    assert neighbours(CLUSTER, 32).bytes_per_s == pytest.approx(150e9)  # the fast links are the limit


def test_two_nodes_reduce_faster_than_their_cards_give_a_ring() -> None:
    """A tree sends the sum of a node once, a ring nearly twice (NVIDIA/nccl-tests#196)."""
    slow = with_links(NODE, replace(NETWORK, gb_per_s=1.0), nodes=2)
    group = neighbours(slow, 16)
    assert group.all_reduce_s(GB) < 0.8 * 2 * group.all_gather_s(GB)


def test_switches_reduce_in_the_network_where_they_can() -> None:
    ring = neighbours(CLUSTER, 8)
    sharp = neighbours(with_links(replace(NODE, switch_reduction=0.75), NETWORK), 8)
    assert sharp.all_reduce_s(GB) == pytest.approx(140e-6 + 1 / (0.75 * 150))
    assert sharp.all_reduce_s(GB) < ring.all_reduce_s(GB)
    assert sharp.all_gather_s(GB) == ring.all_gather_s(GB)


def test_ranks_that_share_a_card_have_it_alone_when_the_others_are_silent() -> None:
    """Four cards for eight GPUs: a stage on all of a node shares them, one on two GPUs of it does not."""
    cluster = with_links(NODE, replace(NETWORK, shared_by=2.0))
    assert group_of(cluster, size=4, stride=8).send_s(GB) == pytest.approx(20e-6 + 1 / 20)
    assert group_of(cluster, size=16, stride=2).send_s(GB) == pytest.approx(20e-6 + 1 / 40)
    assert group_of(cluster, size=4, stride=8).bytes_per_s == pytest.approx(
        20e9
    )  # every rank has such a ring


def test_in_a_mesh_few_ranks_reach_the_links_between_them_only() -> None:
    mesh = with_links(replace(NODE, mesh=True), NETWORK)
    assert neighbours(mesh, 8).bytes_per_s == pytest.approx(150e9)
    assert neighbours(mesh, 2).bytes_per_s == pytest.approx(150e9 / 7)
    assert neighbours(mesh, 8).send_s(GB) == pytest.approx(10e-6 + 7 / 150)


def test_an_all_to_all_crosses_the_network_with_what_is_for_other_nodes_only() -> None:
    group = neighbours(CLUSTER, 16)
    assert group.all_to_all_s(GB) == pytest.approx(60e-6 + 0.5 / 20)  # on a card of its own
    # Eight copies for two nodes: 127 of 128 tokens are wanted in the other one, but each crosses once.
    assert group.all_to_all_s(8 * GB, copies=8) == pytest.approx(60e-6 + (1 - 0.5**8) / 20)


def test_an_oversubscribed_spine_is_slow_where_all_ranks_cross_it() -> None:
    """16 ranks a leaf; above it a quarter of the bandwidth."""
    leaf = replace(NETWORK, size=16, name="leaf")
    spine = replace(NETWORK, gb_per_s=6.25, shared_by=4.0, name="spine")
    cluster = with_links(NODE, leaf, spine, nodes=8)
    assert group_of(cluster, size=2, stride=8).tier == "leaf"
    across = group_of(cluster, size=2, stride=16)
    assert across.tier == "spine"
    assert across.bytes_per_s == pytest.approx(5e9)
    # One ring through everything enters and leaves a leaf once, by all its uplinks.
    assert neighbours(cluster, 64).bytes_per_s == pytest.approx(16 * 5e9)
    assert group_of(cluster, size=8, stride=8).bytes_per_s == pytest.approx(10e9)  # two members a leaf
    assert neighbours(cluster, 64).all_to_all_s(GB) == pytest.approx((6 * 10 + 20) * 1e-6 + 0.75 / 5)


@pytest.mark.parametrize(
    ("world", "size", "nodes"),
    [(512, 64, 1), (512, 16, 1), (72, 72, 1), (144, 16, 2), (144, 8, 1), (64, 16, 1), (360, 40, 2)],
)
def test_jobs_take_as_much_of_a_rack_as_divides_them(world: int, size: int, nodes: int) -> None:
    """Of 72 GPUs a rack, 512 ranks take 64; 144 take all, so that one group in nine of 16 lies across."""
    cluster = preset("gb200_nvl72", nodes=world // 4)
    assert neighbours(cluster, size).nodes == nodes


def test_the_worst_placed_group_counts() -> None:
    """16 of 72: 64-71 are in the first rack, 72-79 in the next; the ring has eight cards each side."""
    across = neighbours(preset("gb200_nvl72", nodes=36), 16)
    assert across.bytes_per_s == pytest.approx(8 * 45e9)
    # Six of a node of eight: 6, 7 | 8-11.
    assert neighbours(CLUSTER, 6).bytes_per_s == pytest.approx(2 * 20e9)
    assert neighbours(with_links(NODE, NETWORK, nodes=1), 6).bytes_per_s == pytest.approx(150e9)


def test_links_within_the_node_end_with_it() -> None:
    cluster = with_links(replace(NODE, within_node=True), NETWORK, gpus_per_node=4)
    assert neighbours(cluster, 8).nodes == 2
    assert neighbours(with_links(NODE, NETWORK, gpus_per_node=4), 8).nodes == 1


def test_the_rank_order_decides_who_is_near() -> None:
    plan = Plan(strategy="s", dp=4, tp=8)
    near = groups_of(CLUSTER, plan)
    assert near["tp"].bytes_per_s == pytest.approx(150e9)
    assert near["dp"].bytes_per_s == pytest.approx(20e9)
    far = groups_of(CLUSTER, replace(plan, rank_order=("dp", "cp", "tp", "pp")))
    assert far["tp"].bytes_per_s < near["tp"].bytes_per_s
    assert far["dp"].bytes_per_s == pytest.approx(150e9)


def test_states_are_shared_over_dp_and_cp() -> None:
    groups = groups_of(CLUSTER, Plan(strategy="s", dp=4, cp=2, tp=2, pp=2))
    sizes = {name: group.size for name, group in groups.items()}
    assert sizes == {
        "tp": 2,
        "cp": 2,
        "dp": 4,
        "pp": 2,
        "state": 8,
        "ep": 1,
        "etp": 1,
        "expert_state": 16,
    }


def test_states_whose_ranks_are_not_side_by_side() -> None:
    """cp=2 in the node, dp=2 on the far side of pp: two members in each of two nodes."""
    plan = Plan(strategy="s", dp=2, cp=2, tp=2, pp=4, rank_order=("cp", "tp", "pp", "dp"))
    state = groups_of(CLUSTER, plan)["state"]
    assert (state.size, state.nodes) == (4, 2)
    assert state.bytes_per_s == pytest.approx(40e9)


@pytest.mark.parametrize(
    ("degrees", "nodes"),
    [
        # tp=8 a node. Whole experts: eight of them beside each other; the same one node after node.
        ({"tp": 8, "dp": 4, "ep": 8}, {"etp": 1, "ep": 1, "expert_state": 4}),
        # Experts cut like everything else: one a node.
        ({"tp": 8, "dp": 4, "ep": 4, "etp": 8}, {"etp": 1, "ep": 4, "expert_state": 1}),
        ({"tp": 4, "dp": 8, "ep": 8, "etp": 2}, {"etp": 1, "ep": 2, "expert_state": 2}),
        ({"tp": 1, "dp": 16, "pp": 2, "ep": 8}, {"etp": 1, "ep": 1, "expert_state": 2}),
        # Stages between the ranks that read different data: 2 * 2 neighbours, then 16 further on.
        (
            {"tp": 2, "dp": 4, "pp": 4, "ep": 4, "rank_order": ("tp", "cp", "pp", "dp")},
            {"ep": 2, "expert_state": 2},
        ),
    ],
)
def test_experts_count_the_ranks_of_a_stage_anew(degrees: dict[str, Any], nodes: dict[str, int]) -> None:
    groups = groups_of(CLUSTER, Plan(strategy="s", **degrees))
    assert {name: groups[name].nodes for name in nodes} == nodes


def test_groups_of_a_known_plan_cost_microseconds() -> None:
    """Searches ask once a candidate. Compared with building one, as machines differ."""
    plans = [Plan(strategy="s", dp=dp, tp=8, pp=3) for dp in range(1, 301)]
    started = time.perf_counter()
    first = [groups_of(CLUSTER, plan) for plan in plans]
    built = time.perf_counter()
    again = [groups_of(CLUSTER, plan) for plan in plans]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert time.perf_counter() - built < (built - started) / 3


# Microseconds of all-reduces that vTrain times in its repository (VIA-Research/vTrain, trace/{a100,v100}/AR_GPU*).
VTRAIN = {
    ("a100_80gb", 2): {1: 45.1, 4: 60.3, 16: 129.4, 64: 404.0, 256: 1454.4, 1024: 5453.4},
    ("a100_80gb", 4): {1: 52.7, 4: 75.8, 16: 177.8, 64: 540.6, 256: 1927.7, 1024: 7275.5},
    ("a100_80gb", 8): {1: 92.2, 4: 94.0, 16: 231.0, 64: 579.6, 256: 2158.0, 1024: 8196.4},
    ("v100", 2): {1: 69.9, 4: 208.2, 16: 763.7, 64: 2998.7, 256: 11909.0, 1024: 47617.0},
    ("v100", 8): {1: 78.6, 4: 151.2, 16: 273.7, 64: 912.2, 256: 3529.2, 1024: 13983.0},
}


@pytest.mark.parametrize(("name", "size"), VTRAIN)
def test_all_reduces_of_a_node_are_as_measured_within_a_fifth(name: str, size: int) -> None:
    group = neighbours(preset(name), size)
    for mib, measured_us in VTRAIN[name, size].items():
        assert group.all_reduce_s(mib * MIB) * 1e6 == pytest.approx(measured_us, rel=0.2), mib


# "busbw" of nccl-tests, GB/s: preset, nodes, ranks, collective, bytes, measured, source.
BUS = [
    ("h100_sxm", 1, 2, "all_reduce", 4 * GIB, 367, "NVIDIA/nccl#1455"),
    ("h100_sxm", 1, 8, "all_reduce", 4 * GIB, 480, "NVIDIA/nccl#1455"),
    ("h200_sxm", 1, 8, "all_reduce", 4 * GIB, 475, "NVIDIA/nccl-tests#272"),
    ("h800_sxm", 1, 8, "all_reduce", 4 * GIB, 215, "NVIDIA/nccl#1374"),
    ("h100_sxm", 1, 8, "all_gather", 4 * GIB, 350, "NVIDIA/nccl#1281"),
    ("h100_sxm", 4, 32, "all_gather", 2 * GIB, 360, "NVIDIA/nccl#1229; its size is not printed"),
    ("h100_sxm", 32, 256, "all_gather", 2 * GIB, 300, "NVIDIA/nccl#1229"),
    ("h200_sxm", 248, 1984, "all_reduce", 512 * MIB, 350, "NVIDIA/nccl-tests#283"),
    ("b200", 1, 8, "all_reduce", 8 * GIB, 830, "NVIDIA/nccl#1807"),
    ("gb200_nvl72", 18, 72, "all_reduce", 512 * MIB, 586, "coreweave/nccl-tests#43"),
    ("gb200_nvl72", 18, 72, "all_reduce", 4 * GIB, 839, "coreweave/nccl-tests#43"),
]


@pytest.mark.parametrize(("name", "nodes", "size", "kind", "num_bytes", "measured", "source"), BUS)
def test_bus_bandwidth_is_as_measured_within_an_eighth(
    name: str, nodes: int, size: int, kind: str, num_bytes: int, measured: float, source: str
) -> None:
    group = neighbours(preset(name, nodes=nodes), size)
    volume = num_bytes * (size - 1) / size * (2 if kind == "all_reduce" else 1)
    assert volume / getattr(group, f"{kind}_s")(num_bytes) / GB == pytest.approx(measured, rel=0.125), source


@pytest.mark.parametrize(("domain", "measured"), [(4, 197), (8, 394)])
def test_rings_of_three_racks_are_as_measured(domain: int, measured: float) -> None:
    """NVIDIA/nccl#1801: parts of GB200 racks, a card of 50 GB/s a GPU, rings forced."""
    cluster = preset("gb200_nvl72", nodes=3 * domain // 4)
    cluster = replace(cluster, links=(replace(cluster.links[0], size=domain), cluster.links[1]))
    reach = neighbours(cluster, 3 * domain).bytes_per_s / GB
    assert reach == pytest.approx(measured, rel=0.1)


def test_half_as_many_cards_as_gpus_are_as_measured() -> None:
    """NVIDIA/nccl-tests#119: A100, four cards of 25 GB/s a node, three nodes, 96 GB/s."""
    cluster = preset("a100_40gb", nodes=3)
    cluster = replace(cluster, links=(cluster.links[0], replace(cluster.links[1], gb_per_s=12.5)))
    group = neighbours(cluster, 24)
    assert 2 * 23 / 24 * 128 * MIB / group.all_reduce_s(128 * MIB) / GB == pytest.approx(96, rel=0.1)
