"""A frozen run on hosts that are named: the same torchrun on each, to be typed there or started through ssh."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.cluster.placement import hosts_in_a_group
from launcher.cluster.switches import order
from launcher.config import Job
from launcher.errors import ConfigError, TrainingError
from strategies.spec import Plan

_LOOK_S = 0.5
_PATIENCE_S = 30.0  # for ssh to take the other side down
# What a worker has to find again on another host; ssh starts a bare shell.
_CARRIED = ("PYTHONPATH", "PYTHONNOUSERSITE", "MESHWRIGHT_HOME", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")


def given(job: Job) -> tuple[str, ...]:
    """Return the hosts of the job as their owner has them; raise ConfigError unless there are enough."""
    submit, count = job.submit, job.cluster.num_nodes
    names = submit.hosts or (read_hostfile(submit.hostfile) if submit.hostfile else ())
    where = "submit.hosts" if submit.hosts or not submit.hostfile else f"submit.hostfile={submit.hostfile}"
    if len(set(names)) != len(names):
        raise ConfigError(f"{where} names a host twice; cluster.gpus_per_node says how many ranks one gets")
    if len(names) < count:
        raise ConfigError(
            f"{where} names {len(names)} hosts and cluster.num_nodes={count} needs {count}; name more, "
            "or plan with less"
        )
    return tuple(names)


def named(job: Job, plan: Plan) -> tuple[str, ...]:
    """Return the hosts that run the job, in the order of its switches where they are known."""
    names = given(job)
    if job.cluster.switches:
        group = hosts_in_a_group(plan, gpus_per_node=job.cluster.gpus_per_node)
        names = order(names, job.cluster.switches, group=group)
    return names[: job.cluster.num_nodes]


def read_hostfile(path: str) -> tuple[str, ...]:
    """Read a host a line; what stands behind it, and comments, are left alone."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"submit.hostfile={path} cannot be read; give a file with one host a line"
        ) from error
    words = (line.partition("#")[0].split() for line in lines)
    return tuple(word[0] for word in words if word)


def argv(
    path: Path, *, job: Job, hosts: Sequence[str], rank: int, python: str, environment: Mapping[str, str]
) -> list[str]:
    """Return what host number `rank` starts: torchrun with a rendezvous on the first host."""
    submit = job.submit
    # Derived from the folder, so that every host that is typed to comes to the same one.
    port = submit.port or 20000 + zlib.crc32(str(path).encode()) % 10000
    carried = [f"{key}={environment[key]}" for key in _CARRIED if key in environment]
    return [
        *(["env", *carried] if carried else []),
        *submit.prefix,
        *[submit.inside or python, "-m", "torch.distributed.run"],
        f"--nnodes={len(hosts)}",
        f"--node-rank={rank}",
        f"--nproc-per-node={job.cluster.gpus_per_node}",
        f"--master-addr={_bare(hosts[0])}",
        f"--master-port={port}",
        *["-m", "launcher", "resume", str(path)],
    ]


def ssh_argv(ssh: Sequence[str], host: str, command: Sequence[str]) -> list[str]:
    """Return the call of ssh: it hands its words to a shell over there, so they are quoted once."""
    # The terminal takes the remote side down with us where a connection breaks.
    return [*ssh, "-tt", host, shlex.join(command)]


def start(commands: Mapping[str, Sequence[str]], *, log: Path, stop_file: Path) -> None:
    """Start one command for each host and wait; raise TrainingError with the first host that failed.

    Ctrl-C asks the workers to leave with a checkpoint, once more ends them at once.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with log.open("ab") as out:
        try:
            for host, command in commands.items():
                processes[host] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            _wait(processes, log=log, stop_file=stop_file)
        finally:
            for process in processes.values():
                _end(process)


def _wait(processes: Mapping[str, subprocess.Popen[bytes]], *, log: Path, stop_file: Path) -> None:
    left = dict(processes)
    asked = False
    while left:
        try:
            time.sleep(_LOOK_S)
            for host, process in list(left.items()):
                code = process.poll()
                if code is None:
                    continue
                del left[host]
                if code:
                    raise TrainingError(f"host {host} ended with exit code {code}; see {log}")
        except KeyboardInterrupt:
            if asked:
                raise
            asked = True
            stop_file.touch()
            print("meshwright: stopping with a checkpoint; once more to end at once", file=sys.stderr)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _bare(host: str) -> str:
    """Return the address in `user@host`."""
    return host.rpartition("@")[2]


def quoted(command: Sequence[str]) -> str:
    """Return what to type in a shell."""
    return shlex.join(command)


def shown(commands: Mapping[str, Sequence[str]]) -> str:
    """Return what to type on each host."""
    return "\n".join(f"# on {host}\n{quoted(command)}" for host, command in commands.items())
