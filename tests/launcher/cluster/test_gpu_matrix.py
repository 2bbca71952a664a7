from __future__ import annotations

from typing import Any

from launcher.cluster import gpu_matrix
from launcher.cluster.spec import Link

NVLINK = Link(name="NVLink", size=8, within_node=True, gb_per_s=450.0, latency_us=2.0, switch_reduction=0.7)
NETWORK = Link(name="InfiniBand", size=None, gb_per_s=50.0, latency_us=15.0)


def test_a_machine_without_gpus_has_no_matrix() -> None:
    assert gpu_matrix.parse("") is None
    assert gpu_matrix.parse("No devices were found\n") is None


def test_one_gpu_is_an_island() -> None:
    text = "\tGPU0\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \tNODE\t0-15\t0\t\tN/A\nNIC0\tNODE\t X\n"
    matrix = gpu_matrix.parse(text)
    assert matrix is not None
    assert gpu_matrix.islands(matrix) == (("GPU0",),)
    assert gpu_matrix.device_order(matrix) == (0,)


def test_nvlinks_are_counted(clusters: dict[str, Any]) -> None:
    matrix = gpu_matrix.parse(clusters["dgx1_cube_mesh"]["matrix"])
    assert matrix is not None
    assert (matrix.nvlinks("GPU0", "GPU3"), matrix.nvlinks("GPU0", "GPU5")) == (2, 0)


def test_bridges_take_the_switch_away(clusters: dict[str, Any]) -> None:
    matrix = gpu_matrix.parse(clusters["pcie_with_bridges"]["matrix"])
    assert matrix is not None
    pair, host, network = gpu_matrix.refine((NVLINK, NETWORK), matrix)
    assert (pair.size, pair.switch_reduction) == (2, None)
    assert host.name == "PCIe 4.0 between sockets"
    assert network == NETWORK


def test_a_whole_node_of_nvlink_stays_as_the_preset_has_it(clusters: dict[str, Any]) -> None:
    matrix = gpu_matrix.parse(clusters["hgx_h100_rails"]["matrix"])
    assert matrix is not None
    assert gpu_matrix.refine((NVLINK, NETWORK), matrix) == (NVLINK, NETWORK)
