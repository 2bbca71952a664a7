"""ClusterSpec: derived values, refused values, and every packaged preset."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import yaml

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.decode import decode

CLUSTER = ClusterSpec(
    name="c",
    num_nodes=2,
    gpus_per_node=4,
    gpu=GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
    links=(Link(size=4, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
PRESETS = [
    entry.name
    for entry in sorted(
        (resources.files("hydra_configs") / "cluster").iterdir(), key=lambda entry: entry.name
    )
    if entry.name.endswith(".yaml") and entry.name not in ("local.yaml", "slurm.yaml")
]


def test_ranks_are_nodes_times_gpus() -> None:
    assert CLUSTER.world_size == 8


def test_the_fastest_tier_that_reaches_far_enough() -> None:
    assert CLUSTER.link_for(4).gb_per_s == 300.0
    assert CLUSTER.link_for(5).gb_per_s == 25.0
    short = replace(CLUSTER, links=CLUSTER.links[:1])
    assert short.link_for(64).gb_per_s == 300.0


def test_a_link_within_the_node_is_as_small_as_the_node() -> None:
    link = replace(CLUSTER.links[0], size=8, within_node=True)
    cluster = replace(CLUSTER, links=(link, CLUSTER.links[1]))
    assert [cluster.reach_of(link) for link in cluster.links] == [4, None]
    assert replace(cluster, gpus_per_node=16).reach_of(link) == 8
    assert replace(cluster, gpus_per_node=16).reach_of(replace(link, size=None)) == 16
    assert cluster.link_for(5).gb_per_s == 25.0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound(name: str) -> None:
    text = (resources.files("hydra_configs") / "cluster" / name).read_text("utf-8")
    values = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}  # Hydra's
    cluster = decode(ClusterSpec, values, "cluster")
    assert cluster.name == name.removesuffix(".yaml")
    assert cluster.num_nodes == 1
    assert 0 < cluster.reserved_gib < cluster.gpu.memory_gib / 10
    assert cluster.host_memory_gib > cluster.gpus_per_node * cluster.gpu.memory_gib / 2
    assert cluster.gpu.peak_tflops["fp16"] >= cluster.gpu.peak_tflops["fp32"]
    speeds = [link.gb_per_s for link in cluster.links]
    assert speeds == sorted(speeds, reverse=True)
    assert cluster.links[-1].size is None
    for link in cluster.links:
        assert link.name
    assert cluster.links[0].within_node or cluster.gpus_per_node < (cluster.links[0].size or 0)
    assert "Source: " in text.splitlines()[0] + text.splitlines()[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_nodes": 0}, "cluster.num_nodes=0 must be at least 1"),
        ({"gpus_per_node": -1}, "cluster.gpus_per_node=-1 must be at least 1"),
        ({"links": ()}, "cluster.links=[] must name at least one tier of links"),
        (
            {"reserved_gib": 80.0},
            "cluster.reserved_gib=80.0 must be below cluster.gpu.memory_gib=80.0 and not negative",
        ),
    ],
)
def test_impossible_clusters_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(CLUSTER, **changes)
    assert str(error.value) == sentence


def test_impossible_gpus_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"cluster\.gpu\.memory_gib=0\.0 must be above 0"):
        replace(CLUSTER.gpu, memory_gib=0.0)
    with pytest.raises(ValueError, match=r"cluster\.gpu\.device=tpu is not accepted; use one of cpu, cuda"):
        replace(CLUSTER.gpu, device="tpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": 0}, "cluster.links.size=0 must be at least 1, or null for the whole cluster"),
        ({"gb_per_s": 0.0}, "cluster.links.gb_per_s=0.0 must be above 0"),
        ({"efficiency": -0.1}, "cluster.links.efficiency=-0.1 must be above 0"),
        ({"small_latency": 0.0}, "cluster.links.small_latency=0.0 must be above 0"),
        ({"shared_by": 0.5}, "cluster.links.shared_by=0.5 must be at least 1"),
        ({"latency_us": -1.0}, "cluster.links.latency_us=-1.0 must not be negative"),
        ({"start_us": -1.0}, "cluster.links.start_us=-1.0 must not be negative"),
        ({"switch_reduction": 0.0}, "cluster.links.switch_reduction=0.0 must be above 0, or null"),
    ],
)
def test_impossible_links_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(CLUSTER.links[0], **changes)
    assert str(error.value) == sentence
