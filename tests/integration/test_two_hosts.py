"""Two emulated hosts with a slow link between them: probed, planned for, trained across, cut, and mended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos, two_hosts
from benchmarks.two_hosts import ADDRESSES, HOST_TIMEOUT_S, NUM_STEPS, STEP_TIMEOUT_S, Fault, TwoHosts
from launcher.run_dir import RunDir

RATE = "400mbit"
# Set by continuous integration where namespaces can be made: not to have them is a fault there.
REQUIRED = "MESHWRIGHT_TEST_TWO_HOSTS"
# Little work and all weights' gradients: whatever these processors do, it is the link that decides.
PLAN = (
    *("plan", "model=gpt2_124m", "strategy=megatron", "plan.tp=1", "training.global_batch_size=8"),
    *("training.sequence_length=64", "--json"),
)
FAST = "cluster.links=[{size: null, gb_per_s: 25, latency_us: 5}]"


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    obstacle = two_hosts.obstacle()
    if obstacle is not None and REQUIRED not in os.environ:
        pytest.skip(obstacle)
    with two_hosts.two_hosts(RATE) as up:
        yield up


def test_the_slow_link_is_measured_and_planned_for(
    hosts: TwoHosts, call: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "slow.yaml"
    link = two_hosts.probe(hosts, file, seconds=30)["links"][-1]
    assert link["gb_per_s"] * link["efficiency"] == pytest.approx(two_hosts.gb_per_s(RATE), rel=0.2)
    slow, fast = (call(*PLAN, f"cluster={file}", *more).json for more in ((), (FAST,)))
    # A slow link is crossed by the activations between two stages, a fast one by the gradients.
    assert [(plan["dp"], plan["pp"]) for plan in (slow, fast)] == [(1, 2), (2, 1)]


@pytest.fixture(scope="module")
def whole(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run that nobody disturbs."""
    run = RunDir(path=tmp_path_factory.mktemp("whole") / "run")
    two_hosts.train(hosts, run, kinds=())
    return run


@pytest.fixture(scope="module")
def disturbed(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[Fault]]:
    """The same run whose link is cut, then one of whose ranks is stopped, then one of whose hosts is killed."""
    run = RunDir(path=tmp_path_factory.mktemp("disturbed") / "run")
    return run, two_hosts.train(hosts, run, kinds=("cut", "stop", "kill"))


def test_the_run_goes_on_as_if_nothing_had_happened(
    whole: RunDir, disturbed: tuple[RunDir, list[Fault]]
) -> None:
    run, _ = disturbed
    assert chaos.trajectory(run) == chaos.trajectory(whole)
    assert [step for step, _, _ in chaos.trajectory(run)] == list(range(1, NUM_STEPS + 1))


def test_each_failure_names_the_host_and_its_rank(disturbed: tuple[RunDir, list[Fault]]) -> None:
    events = [fault.event for fault in disturbed[1]]
    assert [event["cause"] for event in events] == ["lost_node", "hang", "lost_node"]
    assert {event["rank"] for event in events} == {1}
    (host,) = {event["host"] for event in events}
    assert all(f" {host} " in event["message"] for event in events)
    cut, stopped, killed = (event["message"] for event in events)
    assert f"it has not reached {ADDRESSES['a']} over the network for " in cut
    assert "its process is stopped (SIGSTOP or a debugger)" in stopped
    assert "no word from its launcher for " in killed
    for message, limit_s in ((cut, HOST_TIMEOUT_S), (stopped, STEP_TIMEOUT_S)):
        seconds = float(message.rpartition(" s")[0].rpartition(" for ")[2].split()[0])
        assert limit_s <= seconds <= 1.5 * limit_s


def test_nothing_is_counted_twice(disturbed: tuple[RunDir, list[Fault]]) -> None:
    names = [event["event"] for event in disturbed[0].events()]
    counts = {name: names.count(name) for name in ("launched", "started", "failed", "restarting", "finished")}
    assert counts == {"launched": 4, "started": 4, "failed": 3, "restarting": 3, "finished": 1}
