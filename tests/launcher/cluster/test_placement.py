from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from launcher.cluster import detect, gpu_matrix, placement, slurm, switches
from launcher.cluster.hostlist import expand
from launcher.cluster.spec import ClusterSpec, Link, Switch
from launcher.decode import decode
from strategies.spec import Plan


def test_there_are_enough_clusters(clusters: dict[str, Any]) -> None:
    assert len(clusters) >= 12
    assert {"nvl72_blocks", "eight_pcie", "hgx_h100_rails", "two_levels_oversubscribed"} <= set(clusters)


def test_the_links_are_the_documented_ones(described: dict[str, Any]) -> None:
    expected = described.get("cluster", {})
    if "nodes" in described:
        told = slurm.Told(
            nodes=described["nodes"],
            topology=described["topology"],
            partitions=described["partitions"],
            allocation=expand(described.get("allocation", "")),
        )
        spec = decode(ClusterSpec, slurm.complete(described.get("section", {}), told), "cluster")
        for key in ("num_nodes", "gpus_per_node", "partition"):
            assert getattr(spec, key) == expected[key]
        links = spec.links
    elif "preset" in described:
        known = detect.preset(described["preset"])
        links = tuple(decode(Link, link) for link in known["links"])
        if "matrix" in described:
            matrix = gpu_matrix.parse(described["matrix"])
            assert matrix is not None
            links = gpu_matrix.refine(links, matrix)
        else:
            tree = [decode(Switch, switch) for switch in described["switches"]]
            links = switches.tiers(links, tree, gpus_per_node=known["gpus_per_node"])
    else:
        assert "order" in described
        return
    assert [link.size for link in links] == expected["sizes"]
    assert [link.gb_per_s for link in links] == expected["speeds"]


def test_the_hosts_stand_in_the_documented_order(described: dict[str, Any]) -> None:
    if "order" not in described:
        assert "matrix" in described, "a cluster says something about hosts or about GPUs"
        return
    names = expand(described["hosts"])
    if "switches" in described:
        tree = [decode(Switch, switch) for switch in described["switches"]]
        ordered = switches.order(names, tree, group=described["group"])
    else:
        ordered = placement.hosts("\n".join([*names, described["topology"]]), group=described["group"])
    assert list(ordered) == described["order"]
    assert sorted(ordered) == sorted(names)


def test_the_gpus_stand_in_the_documented_order(described: dict[str, Any]) -> None:
    if "matrix" not in described:
        assert "order" in described
        return
    matrix = gpu_matrix.parse(described["matrix"])
    assert matrix is not None
    found = [[int(gpu.removeprefix("GPU")) for gpu in island] for island in gpu_matrix.islands(matrix)]
    assert found == described["islands"]
    assert list(gpu_matrix.device_order(matrix)) == described["devices"]
    assert gpu_matrix.has_rails(matrix) is described["rails"]
    cards = gpu_matrix.nearest_cards(matrix)
    for gpu, near in described["cards"].items():
        assert list(cards[gpu]) == near


@pytest.mark.parametrize(
    ("plan", "per_node", "hosts"),
    [
        ({"dp": 16}, 8, 1),  # one degree alone: nobody is nearer than the next
        ({"tp": 8, "dp": 4, "pp": 2}, 8, 4),  # the data parallel ranks of a stage
        ({"tp": 8, "pp": 4, "dp": 2, "rank_order": ("tp", "cp", "pp", "dp")}, 8, 4),  # a whole pipeline
        ({"tp": 2, "dp": 2}, 8, 1),
        ({"tp": 8, "cp": 2, "dp": 2}, 4, 4),
        ({"dp": 1}, 1, 1),
    ],
)
def test_a_group_is_what_the_slowest_degree_repeats(plan: dict[str, Any], per_node: int, hosts: int) -> None:
    chosen = Plan(strategy="megatron", **plan)
    assert placement.hosts_in_a_group(chosen, gpus_per_node=per_node) == hosts


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "0,4,1,5,2,6,3,7"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,4,5"}, "0,4,1,5"),
        ({"CUDA_VISIBLE_DEVICES": "0,4,1,5,2,6,3,7"}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1234,GPU-5678"}, None),
    ],
)
def test_devices_follow_the_bridges(
    clusters: dict[str, Any], environ: dict[str, str], expected: str | None
) -> None:
    matrix = gpu_matrix.parse(clusters["pcie_with_bridges"]["matrix"])
    assert placement.devices(matrix, environ) == expected


def test_workers_inherit_the_order(clusters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gpu_matrix.parse(clusters["pcie_with_bridges"]["matrix"])
    monkeypatch.setattr(detect, "query_matrix", lambda: matrix)
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,4,5"}
    placement.place(environ)
    assert environ == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,4,1,5"}
    whole = {"CUDA_VISIBLE_DEVICES": "0,4"}
    placement.place(whole)
    assert whole == {"CUDA_VISIBLE_DEVICES": "0,4"}


def test_nothing_changes_where_nothing_is_known() -> None:
    assert placement.devices(None, {}) is None


def test_the_job_script_reads_a_host_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = "SwitchName=a Level=0 Nodes=n2\nSwitchName=b Level=0 Nodes=n[1,3]\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"n1\nn2\nn3\n{topology}"))
    assert placement.main(["hosts", "1"]) == 0
    assert capsys.readouterr().out == "n1\nn3\nn2\n"
    monkeypatch.setattr(detect, "query_matrix", lambda: None)
    assert placement.main(["devices"]) == 0
    assert capsys.readouterr().out == "\n"
