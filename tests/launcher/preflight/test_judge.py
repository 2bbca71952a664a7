"""Every fault is found on the node that has it, and sound nodes beside it pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec
from launcher.preflight.gathered import Exchange, Gathered
from launcher.preflight.judge import NodeVerdict, assumed_product_tflops
from launcher.preflight.look import Port, Volume

Verdicts = Callable[..., dict[str, NodeVerdict]]
GIVEN = {"path": "/tmp", "use": "the folder for temporary files"}
DOWN = Port(name="mlx5_0/1", state="DOWN", physical="Polling", rate="10 Gb/sec", layer="IB")
SLOW = Port(name="mlx5_0/1", state="ACTIVE", physical="LinkUp", rate="200 Gb/sec (2X NDR)", layer="IB")


def failed(verdicts: dict[str, NodeVerdict]) -> dict[str, list[str]]:
    return {host: [check.name for check in v.faults] for host, v in verdicts.items() if not v.passed}


def test_sound_nodes_pass_every_check(sound: Gathered, verdicts: Verdicts) -> None:
    told = verdicts(sound)
    assert failed(told) == {} and list(told) == ["n0", "n1", "n2", "n3"]
    assert {check.mark for verdict in told.values() for check in verdict.checks} == {"pass"}
    assert len(told["n0"].checks) == 10


@pytest.mark.parametrize(
    ("changes", "check", "sentence"),
    [
        ({"gpu_names": ("NVIDIA H100 80GB HBM3",)}, "gpus", "1 GPUs answer, 2 are planned"),
        (
            {"gpu_names": ("NVIDIA A100", "NVIDIA A100")},
            "gpus",
            "it has NVIDIA A100, most nodes have NVIDIA H100",
        ),
        ({"gpu_readings": ({"index": 1.0, "remap_pending": 1.0},)}, "health", "GPU 1: bad memory waits"),
        (
            {"gpu_readings": None, "silent": {"gpu_readings": "no answer within 15 s"}},
            "health",
            "no answer within",
        ),
        (
            {"versions": {"driver": "565.9", "python": "3.11.7"}},
            "versions",
            "driver is 565.9, and 570.1 on 3 of 4",
        ),
        ({"memory_gib": 400.0}, "memory", "400.0 of 1000.0 GiB of host memory are free"),
        (
            {"volumes": (Volume(**GIVEN, free_gib=3.0),)},
            "disk",
            "has 3.0 GiB left, preflight.min_disk_gib=10",
        ),
        ({"volumes": (Volume(**GIVEN, free_gib=99.0, free_inodes=7),)}, "disk", "has room for 7 files"),
        ({"volumes": (Volume(**GIVEN, fault="Read-only file system"),)}, "disk", "Read-only file system"),
        ({"ports": (DOWN,)}, "network", r"port mlx5_0/1 is DOWN (Polling), it is active on 3 of 4 nodes"),
        ({"ports": (SLOW,)}, "network", "runs at 200 Gb/sec (2X NDR), others at 400 Gb/sec"),
        ({"ports": ()}, "network", "port mlx5_0/1 is not there"),
    ],
)
def test_the_node_that_shows_a_fault_fails_alone(
    node: Callable[..., Gathered], verdicts: Verdicts, changes: dict[str, Any], check: str, sentence: str
) -> None:
    told = verdicts(node(**changes))
    assert failed(told) == {"n2": [check]}
    assert sentence in told["n2"].faults[0].sentence


@pytest.mark.parametrize(
    ("rates", "slow"),
    [
        (("200 Gb/sec (2X NDR)", "400 Gb/sec (4X NDR)"), ["n0"]),
        (("200 Gb/sec (2X NDR)", "800 Gb/sec (8X NDR)", "200 Gb/sec (4X HDR)"), []),
    ],
)
def test_of_ports_at_different_rates_only_the_slower_is_broken(
    sound: Gathered, verdicts: Verdicts, rates: tuple[str, ...], slow: list[str]
) -> None:
    ranks = tuple(
        replace(rank, facts=replace(rank.facts, ports=(replace(SLOW, rate=rates[rank.node]),)))
        if rank.facts
        else rank
        for rank in sound.ranks
        if rank.node < len(rates)
    )
    met = tuple(pair for pair in sound.exchanges if max(pair.a, pair.b) < len(rates))
    clocks = {str(node): 0.0 for node in range(len(rates))}
    found = replace(sound, num_nodes=len(rates), ranks=ranks, exchanges=met, clocks_s=clocks)
    assert failed(verdicts(found)) == {host: ["network"] for host in slow}


def test_a_node_that_does_not_answer_is_named_by_the_job(sound: Gathered, verdicts: Verdicts) -> None:
    absent = replace(sound, ranks=tuple(rank for rank in sound.ranks if rank.node != 3))
    told = verdicts(absent)
    assert failed(told) == {"n3": ["answer"]}
    assert told["n3"].faults[0].sentence == "it gave no answer within preflight.nodes_timeout_s=180"
    half = replace(sound, ranks=sound.ranks[:-1])
    assert "1 of its 2 ranks gave no answer" in verdicts(half)["n3"].faults[0].sentence


def test_clocks_are_held_against_the_median(sound: Gathered, verdicts: Verdicts) -> None:
    off = replace(sound, clocks_s={"0": 100.0, "1": 100.2, "2": 100.1, "3": 60.0})
    assert failed(verdicts(off)) == {"n3": ["clock"]}, "the collector's own clock may be the wrong one"
    assert failed(verdicts(off, max_clock_skew_s=60)) == {}


def test_a_slow_product_is_one_below_the_planner_or_below_the_others(
    sound: Gathered, verdicts: Verdicts
) -> None:
    def with_speed(speeds: dict[int, float]) -> Gathered:
        ranks = (replace(r, product_tflops=speeds.get(r.rank, r.product_tflops)) for r in sound.ranks)
        return replace(sound, ranks=tuple(ranks))

    assert failed(verdicts(with_speed({5: 300.0}))) == {"n2": ["product"]}
    assert "on its slowest rank, 5" in verdicts(with_speed({5: 300.0}))["n2"].faults[0].sentence
    everybody = verdicts(with_speed(dict.fromkeys(range(8), 300.0)))
    assert set(failed(everybody)) == {"n0", "n1", "n2", "n3"}
    assert "that are assumed by the planner" in everybody["n0"].faults[0].sentence
    broken = replace(sound, ranks=(replace(sound.ranks[0], fault="CUDA error: device"), *sound.ranks[1:]))
    assert verdicts(broken)["n0"].faults[0].sentence == "rank 0: CUDA error: device"


def test_of_pairs_the_slow_node_is_named_and_not_its_partners(sound: Gathered, verdicts: Verdicts) -> None:
    slow = tuple(replace(pair, gb_per_s=9.0) if 1 in (pair.a, pair.b) else pair for pair in sound.exchanges)
    told = verdicts(replace(sound, exchanges=slow))
    assert failed(told) == {"n1": ["pairs"]}
    assert "9 GB/s a rank and direction in the best of 3 exchanges" in told["n1"].faults[0].sentence
    dead = tuple(
        Exchange(a=pair.a, b=pair.b, fault="timed out") if 1 in (pair.a, pair.b) else pair
        for pair in sound.exchanges
    )
    told = verdicts(replace(sound, exchanges=dead))
    assert failed(told) == {"n1": ["pairs"]}
    assert "no exchange with n2 and others came to an end: timed out" in told["n1"].faults[0].sentence


def test_one_slow_pair_does_not_tell_which_node(sound: Gathered, verdicts: Verdicts) -> None:
    ranks = tuple(rank for rank in sound.ranks if rank.node < 2)
    two = replace(
        sound, num_nodes=2, world_size=4, ranks=ranks, exchanges=(Exchange(a=0, b=1, gb_per_s=3.0),)
    )
    told = verdicts(two)
    assert failed(told) == {"n0": ["pairs"], "n1": ["pairs"]}
    assert told["n0"].faults[0].sentence.endswith("one pair does not tell which of the two")


def test_processors_have_no_gpus_to_look_at(
    sound: Gathered, verdicts: Verdicts, processors: ClusterSpec
) -> None:
    told = verdicts(sound, cluster=processors)
    marks = {check.name: check for check in told["n0"].checks}
    assert failed(told) == {}
    assert (marks["gpus"].mark, marks["gpus"].sentence) == ("not applicable", "no GPU is planned")
    assert marks["health"].mark == "not applicable"


def test_what_the_planner_assumes_of_a_product() -> None:
    gpu = GpuSpec(name="x", memory_gib=80.0, memory_gb_per_s=3000.0, peak_tflops={"bf16": 1000.0})
    large, small = (assumed_product_tflops(gpu, precision="bf16", side=side) for side in (8192, 512))
    assert large is not None and small is not None
    assert 0.65 * 1000 < large < 0.7 * 1000, "the share of the default efficiency, less the edges"
    assert small < large / 1.3
    assert assumed_product_tflops(gpu, precision="fp64", side=8192) is None
    assert assumed_product_tflops(replace(gpu, peak_is_nominal=True), precision="bf16", side=8192) is None


def test_where_no_driver_answers_the_product_tells(node: Callable[..., Gathered], verdicts: Verdicts) -> None:
    told = verdicts(node(gpu_names=(), gpu_readings=(), versions={"python": "3.11.7"}))
    marks = {check.name: check.mark for check in told["n2"].checks}
    assert (marks["gpus"], marks["health"]) == ("not applicable", "not applicable")
    assert failed(verdicts(node(gpu_names=()))) == {"n2": ["gpus"]}, "a driver without a GPU is a lost one"
