from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import slurm
from launcher.errors import ClusterError


def told(case: dict[str, Any], **changes: Any) -> slurm.Told:
    keys = ("nodes", "topology", "partitions")
    return slurm.Told(**{**{key: case[key] for key in keys}, **changes})


def test_both_forms_of_the_listing_say_the_same(clusters: dict[str, Any]) -> None:
    short = slurm.parse_nodes(clusters["recorded_tree"]["nodes"])
    long = slurm.parse_nodes(clusters["recorded_multiline"]["nodes"])
    assert [node.name for node in short] == ["node0", "node1", "node2", "node3"]
    assert long[0] == short[0]
    assert [node.is_usable for node in long] == [True, False, False]
    node = short[0]
    assert (node.gpu_kind, node.num_gpus, node.num_cores, node.partitions) == ("h100", 8, 16, ("gpu",))
    assert node.memory_gib == pytest.approx(1000000 / 1024)


@pytest.mark.parametrize(
    ("gres", "kind", "count"),
    [
        ("gpu:8", "", 8),
        ("gpu:h100:8(S:0-1)", "h100", 8),
        ("gpu:nvidia_a100-sxm4-80gb:4(S:0,3),shard:16", "nvidia_a100-sxm4-80gb", 4),
        ("craynetwork:4,gpu:a100:4", "a100", 4),
        ("(null)", "", 0),
    ],
)
def test_gres_tells_kind_and_count(gres: str, kind: str, count: int) -> None:
    (node,) = slurm.parse_nodes(f"NodeName=n CPUTot=8 RealMemory=1024 State=IDLE Gres={gres} Partitions=p")
    assert (node.gpu_kind, node.num_gpus) == (kind, count)


@pytest.mark.parametrize("state", ["DOWN", "IDLE+DRAIN", "IDLE*", "MAINT", "IDLE+NOT_RESPONDING", "INVAL"])
def test_a_node_that_gets_no_job_does_not_count(state: str) -> None:
    (node,) = slurm.parse_nodes(f"NodeName=n State={state} Partitions=p")
    assert not node.is_usable


@pytest.mark.parametrize(
    "state", ["IDLE", "MIXED", "IDLE+CLOUD+POWERED_DOWN", "IDLE+POWERING_DOWN", "ALLOCATED~"]
)
def test_a_node_that_slurm_would_start_counts(state: str) -> None:
    (node,) = slurm.parse_nodes(f"NodeName=n State={state} Partitions=p")
    assert node.is_usable


@pytest.mark.parametrize("kind", ["gh200", "nvidia_gh200_120gb", "a100_3g.40gb", "a100"])
def test_a_kind_that_no_preset_describes_is_asked_for(clusters: dict[str, Any], kind: str) -> None:
    nodes = clusters["recorded_tree"]["nodes"].replace("h100", kind)
    with pytest.raises(ClusterError, match=r"names no preset; set cluster\.preset"):
        slurm.complete({}, told(clusters["recorded_tree"], nodes=nodes))


def test_the_default_partition_is_found(clusters: dict[str, Any]) -> None:
    assert slurm.default_partition(clusters["recorded_tree"]["partitions"]) == "gpu"
    assert slurm.default_partition("PartitionName=a Default=NO") is None


def test_what_is_given_stays(clusters: dict[str, Any]) -> None:
    section = {"num_nodes": 2, "gpus_per_node": 4, "gpu": {"memory_gib": 60.0}, "reserved_gib": None}
    found = slurm.complete(section, told(clusters["recorded_tree"]))
    assert (found["num_nodes"], found["gpus_per_node"], found["gpu"]["memory_gib"]) == (2, 4, 60.0)
    assert found["gpu"]["name"] == "H100-SXM5-80GB"
    assert found["reserved_gib"] == 3.0


@pytest.mark.parametrize(
    ("case", "section", "sentence"),
    [
        (
            "recorded_tree",
            {"partition": "nope"},
            "cluster.partition=nope has no usable node; set .* one of gpu",
        ),
        (
            "mixed_kinds",
            {},
            "mixes nodes of .*a100.* .8 a node., .*v100.*; name one kind with cluster.gpu_kind",
        ),
        ("mixed_kinds", {"gpu_kind": "h100"}, "cluster.gpu_kind=h100 is in no node of"),
        ("recorded_tree", {"preset": "h1000"}, "cluster.preset=h1000 is no packaged cluster"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    clusters: dict[str, Any], case: str, section: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ClusterError, match=sentence):
        slurm.complete(section, told(clusters[case]))


@pytest.mark.parametrize("kind", ["a100", "h100_pcie", "rtx4090", ""])
def test_a_kind_that_says_too_little_asks_for_a_preset(clusters: dict[str, Any], kind: str) -> None:
    case = clusters["recorded_tree"]
    nodes = (
        case["nodes"].replace("gpu:h100:8", f"gpu:{kind}:8" if kind else "gpu:8").replace("=h100", "=(null)")
    )
    with pytest.raises(ClusterError, match=r"names no preset; set cluster.preset"):
        slurm.complete({}, told(case, nodes=nodes))
    assert slurm.complete({"preset": "a100_40gb"}, told(case, nodes=nodes))["gpu"]["memory_gib"] > 30


@pytest.mark.parametrize(
    ("kind", "features", "preset"),
    [("a100", "a100,80gb", "a100_80gb"), ("nvidia_h100_80gb_hbm3", "", "h100_sxm"), ("mi300x", "", "mi300x")],
)
def test_features_help(clusters: dict[str, Any], kind: str, features: str, preset: str) -> None:
    text = f"NodeName=n State=IDLE Gres=gpu:{kind}:8 AvailableFeatures={features} Partitions=gpu"
    found = slurm.complete({}, told(clusters["recorded_tree"], nodes=text))
    assert found["gpu"] == slurm.detect.preset(preset)["gpu"]


def test_a_host_without_slurm_says_so(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = call("plan", "cluster=slurm")
    assert outcome.code == 8
    assert "cluster=slurm needs the command scontrol" in outcome.err


def test_slurms_own_fault_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text(
        "#!/bin/sh\necho 'slurm_load_node error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"`scontrol show node -o` failed: .*Unable to contact"):
        slurm.ask({})
