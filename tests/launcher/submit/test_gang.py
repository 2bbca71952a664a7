from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import replace

import pytest

from launcher.cluster import detect
from launcher.cluster.spec import ClusterSpec
from launcher.errors import ClusterError
from launcher.submit import gang

SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "n[0-2]",
    "SLURMD_NODENAME": "n1",
    "SLURM_JOB_ID": "7",
}


@pytest.fixture
def cluster() -> ClusterSpec:
    """Nodes of two processes."""
    return detect.detect({"gpus_per_node": 2, "gpu": {"device": "cpu"}})


def test_alone_all_ranks_are_ours(cluster: ClusterSpec) -> None:
    place = gang.find(cluster, verb="x", environ={})
    assert (place.ranks, place.world_size, place.leads) == ((0, 1), 2, True)
    assert place.host == socket.gethostname()
    assert gang.find(cluster, verb="x", environ={**SLURM, "SLURM_STEP_NUM_NODES": "1"}).host == "n1"
    told = place.environment(1, {"PATH": "/bin"})
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("1", "1", "2")
    assert (told["MASTER_ADDR"], told["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


def test_srun_starts_one_task_a_node(cluster: ClusterSpec) -> None:
    several = replace(cluster, num_nodes=3)
    place = gang.find(several, verb="x", environ=SLURM)
    assert (place.node, place.ranks, place.address, place.leads) == (1, (2, 3), "n0", False)
    assert place.host == "n1"
    told = place.environment(3, {})
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("3", "1", "6")
    assert "GLOO_SOCKET_IFNAME" not in told, "loopback reaches no other node"
    ordered = gang.find(several, verb="x", environ={**SLURM, gang.HOSTS: "n1\nn2\nn0\n"})
    assert (ordered.node, ordered.address, ordered.leads) == (0, "n1", True)
    assert ordered.port == place.port
    with pytest.raises(ClusterError, match=r"3 tasks on 3 nodes and cluster\.num_nodes=2"):
        gang.find(replace(cluster, num_nodes=2), verb="x", environ=SLURM)


def test_torchrun_has_started_the_ranks(cluster: ClusterSpec) -> None:
    told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "5", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}
    told |= {"MASTER_ADDR": "n0", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = gang.find(replace(cluster, num_nodes=3), verb="x", environ=told)
    assert (place.node, place.num_nodes, place.ranks, place.port) == (2, 3, (5,), 29500)
    assert place.has_store and not place.leads


def test_several_nodes_need_a_start_on_each(cluster: ClusterSpec) -> None:
    with pytest.raises(ClusterError, match=r"`srun --ntasks-per-node=1 meshwright probe x`"):
        gang.find(replace(cluster, num_nodes=2), verb="probe x", environ={})


def test_no_member_is_left_and_each_says_why_it_failed() -> None:
    code = f"import sys; print('noise', file=sys.stderr); print('{gang.FAULT}it broke', file=sys.stderr); sys.exit(3)"
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    with gang.members([([sys.executable, "-c", code], os.environ), (sleeping, os.environ)]) as started:
        assert gang.wait(started[:1], timeout_s=60)
        assert started[0].process.returncode == 3 and started[0].fault() == "it broke"
        before = time.monotonic()
        assert not gang.wait(started, timeout_s=0.2)
        assert time.monotonic() - before < 30
    assert started[1].process.returncode is not None


def test_members_are_spoken_to_where_they_have_pipes() -> None:
    echo = [sys.executable, "-c", "print(input().upper(), flush=True)"]
    with gang.members([(echo, os.environ)], pipes=True) as [member]:
        assert member.process.stdin is not None and member.process.stdout is not None
        member.process.stdin.write(b"well\n")
        member.process.stdin.flush()
        assert member.process.stdout.readline() == b"WELL\n"
