"""Processes that measure together, one a rank on any number of nodes: which we start, where they meet, their end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from launcher.cluster import detect
from launcher.cluster.hostlist import expand
from launcher.cluster.spec import ClusterSpec
from launcher.errors import ClusterError
from launcher.submit import local

FAULT = "probe fault: "  # what a worker writes before its one sentence
HOSTS = "MESHWRIGHT_HOSTS"  # told by train.sbatch: all hosts of the job in their order, one a line
_LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Place:
    """The ranks that this process starts, among those of all nodes, and where all of them meet."""

    node: int
    num_nodes: int
    ranks: tuple[int, ...]
    ranks_per_node: int
    address: str
    port: int
    hosts: tuple[str, ...] = ()  # of all nodes, where somebody has told
    has_store: bool = False  # torchrun serves one at the port

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def leads(self) -> bool:
        """Tell whether results are collected here."""
        return 0 in self.ranks

    @property
    def host(self) -> str:
        """This node's name: as Slurm calls it, else as it calls itself."""
        return self.hosts[self.node] if self.hosts else socket.gethostname()

    def environment(self, rank: int, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return what the process of one rank inherits, in torchrun's words."""
        variables = local.environment(
            inherited, num_processes=self.ranks_per_node, num_cores=detect.count_cores()
        )
        if self.num_nodes > 1 and "GLOO_SOCKET_IFNAME" not in inherited:
            variables.pop("GLOO_SOCKET_IFNAME", None)  # loopback reaches no other node
        return {
            **variables,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % self.ranks_per_node),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": str(self.has_store),
        }


def find(cluster: ClusterSpec, *, verb: str, environ: Mapping[str, str] = os.environ) -> Place:
    """Return our place: a rank of torchrun, one task a node of srun, or all of a single node."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return _of_torchrun(environ)
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        return _of_srun(cluster, environ)
    if cluster.num_nodes > 1:
        raise ClusterError(
            f"cluster.num_nodes={cluster.num_nodes} needs a start on every node: `srun --ntasks-per-node=1 meshwright "
            f"{verb}` inside an allocation, or `torchrun --nnodes={cluster.num_nodes} "
            f"--nproc-per-node={cluster.gpus_per_node} ... -m launcher {verb}` on each; or use cluster.num_nodes=1"
        )
    return Place(
        node=0,
        num_nodes=1,
        ranks=tuple(range(cluster.gpus_per_node)),
        ranks_per_node=cluster.gpus_per_node,
        address="127.0.0.1",
        port=_free_port(),
        # What Slurm calls this node is what it is to be told of it.
        hosts=(environ["SLURMD_NODENAME"],) if "SLURMD_NODENAME" in environ else (),
    )


def _of_torchrun(environ: Mapping[str, str]) -> Place:
    per_node = int(environ["LOCAL_WORLD_SIZE"])
    return Place(
        node=int(environ["RANK"]) // per_node,
        num_nodes=int(environ["WORLD_SIZE"]) // per_node,
        ranks=(int(environ["RANK"]),),
        ranks_per_node=per_node,
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
        has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_srun(cluster: ClusterSpec, environ: Mapping[str, str]) -> Place:
    hosts = tuple(environ.get(HOSTS, "").split()) or expand(environ["SLURM_STEP_NODELIST"])
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", len(hosts)))
    if len(hosts) != cluster.num_nodes or tasks != len(hosts):
        raise ClusterError(
            f"srun has started {tasks} tasks on {len(hosts)} nodes and cluster.num_nodes={cluster.num_nodes}; "
            "start one task on each node that is planned for: --ntasks-per-node=1"
        )
    node, per_node = hosts.index(environ["SLURMD_NODENAME"]), cluster.gpus_per_node
    return Place(
        node=node,
        num_nodes=len(hosts),
        ranks=tuple(range(node * per_node, (node + 1) * per_node)),
        ranks_per_node=per_node,
        address=hosts[0],
        port=10000
        + (16 * int(environ["SLURM_JOB_ID"]) + int(environ.get("SLURM_RESTART_COUNT", "0"))) % 10000,
        hosts=hosts,
    )


def scratch() -> str | None:
    """Return where files of a measurement lie: in memory, so that a full or broken disk can still be told of."""
    memory = "/dev/shm"
    return memory if os.access(memory, os.W_OK | os.X_OK) else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Member:
    """One process that was started, and what it writes to standard error."""

    process: subprocess.Popen[bytes]
    stderr: IO[bytes]

    def fault(self) -> str:
        """Return its one sentence, else its last line."""
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr.read().decode("utf-8", errors="replace").splitlines()]
        named = [line.partition(FAULT)[2] for line in lines if FAULT in line]
        said = [line for line in lines if line]
        return named[0] if named else said[-1] if said else "nothing was said"


@contextmanager
def members(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, pipes: bool = False
) -> Iterator[list[Member]]:
    """Start a process for each command and environment; none of them is there afterwards.

    With `pipes` they are spoken to through standard input and output.
    """
    channel = subprocess.PIPE if pipes else subprocess.DEVNULL
    started: list[Member] = []
    try:
        for command, environment in commands:
            stderr = tempfile.TemporaryFile(dir=scratch())  # noqa: SIM115 - lives as long as the process
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=channel,
                stdout=channel,
                stderr=stderr,
                start_new_session=True,
                bufsize=0,  # what a dead one was not told is not told at the end either
            )
            started.append(Member(process=process, stderr=stderr))
        yield started
    finally:
        for member in started:
            _end(member)


def _end(member: Member) -> None:
    if member.process.poll() is None:
        os.killpg(member.process.pid, signal.SIGKILL)
    member.process.wait()
    for stream in (member.process.stdin, member.process.stdout, member.stderr):
        if stream is not None:
            stream.close()


def wait(started: Sequence[Member], *, timeout_s: float) -> bool:
    """Wait for the end of all of `started`; tell whether it came in time."""
    deadline = time.monotonic() + timeout_s
    while any(member.process.poll() is None for member in started):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def command(module: str, *words: str) -> list[str]:
    """Return the call of a worker's module."""
    return [sys.executable, "-m", module, *words]
