"""A frozen run on hosts that are named: a launcher on each, typed there or started through ssh, and its torchrun."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from launcher.cluster import network
from launcher.cluster.placement import hosts_in_a_group
from launcher.cluster.switches import order
from launcher.config import Job
from launcher.errors import ConfigError, RunDirError, TrainingError
from launcher.run_dir import RunDir
from strategies.spec import Plan

_LOOK_S = 0.5
_PATIENCE_S = 30.0  # for ssh to take the other side down, and for hosts to end after the first one
_AGAIN_S = 5.0
_CONNECTED_S = 180.0  # an attempt that gets no answer takes two minutes
_CUT_OFF = (129, 137, 255)  # hung up, killed, and ssh's own word for a connection that failed
# What a worker has to find again on another host; ssh starts a bare shell.
_CARRIED = ("PYTHONPATH", "PYTHONNOUSERSITE", "MESHWRIGHT_HOME", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")


def given(job: Job) -> tuple[str, ...]:
    """Return the hosts of the job as their owner has them; raise ConfigError unless there are enough."""
    submit, count = job.submit, job.cluster.num_nodes
    names = submit.hosts or (read_hostfile(submit.hostfile) if submit.hostfile else ())
    where = "submit.hosts" if submit.hosts or not submit.hostfile else f"submit.hostfile={submit.hostfile}"
    if len(set(map(address, names))) != len(names):
        raise ConfigError(f"{where} names a host twice; cluster.gpus_per_node says how many ranks one gets")
    if len(names) < count:
        raise ConfigError(
            f"{where} names {len(names)} hosts and cluster.num_nodes={count} needs {count}; name more, "
            "or plan with less"
        )
    return tuple(names)


def settled(job: Job) -> Job:
    """Return the job with its hosts in it: no other host finds a file where we did, and nobody edits it any more."""
    return replace(job, submit=replace(job.submit, hosts=given(job), hostfile=None))


def named(job: Job, plan: Plan) -> tuple[str, ...]:
    """Return the hosts that run the job, in the order of its switches where they are known."""
    names = given(job)
    if job.cluster.switches:
        group = hosts_in_a_group(plan, gpus_per_node=job.cluster.gpus_per_node)
        given_as = {address(name): name for name in names}  # switches know nothing of users
        names = tuple(given_as[host] for host in order(tuple(given_as), job.cluster.switches, group=group))
    return names[: job.cluster.num_nodes]


def of_run(run: RunDir) -> tuple[str, ...]:
    """Return the hosts of a frozen run; another plan does not change their order, since each has its number by then."""
    return named(run.job(), run.first_plan())


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


def check_port(job: Job) -> None:
    """Raise ConfigError unless the rendezvous can have its port, and the door of the first host the one behind."""
    port = job.submit.port
    if port is not None and not 1 <= port < 65535:
        raise ConfigError(
            f"submit.port={port} is no port with another one behind it, and hosts need both; use 1 to 65534, or null "
            "for two that follow from the folder"
        )


def port_of(path: Path, job: Job) -> int:
    """Return the port of the rendezvous: derived from the folder, so that every host comes to the same one."""
    return job.submit.port or 20000 + zlib.crc32(str(path).encode()) % 10000


def argv(path: Path, *, job: Job, node: int, python: str, environment: Mapping[str, str]) -> list[str]:
    """Return what starts the launcher of host number `node`."""
    submit = job.submit
    carried = [f"{key}={environment[key]}" for key in _CARRIED if key in environment]
    return [
        *(["env", *carried] if carried else []),
        *submit.prefix,
        *[submit.inside or python, "-m", "launcher", "submit", str(path), f"--node-rank={node}"],
    ]


def torchrun_argv(path: Path, *, job: Job, hosts: Sequence[str], node: int, python: str) -> list[str]:
    """Return how that launcher starts its workers: torchrun with a rendezvous on the first host."""
    return [
        *[python, "-m", "torch.distributed.run"],
        f"--nnodes={len(hosts)}",
        f"--node-rank={node}",
        f"--nproc-per-node={job.cluster.gpus_per_node}",
        f"--master-addr={address(hosts[0])}",
        f"--master-port={port_of(path, job)}",
        *["-m", "launcher.training.worker", str(path)],
    ]


def node_here(names: Sequence[str]) -> int | None:
    """Return which of the hosts this one is; None where it is none of them."""
    return next((node for node, name in enumerate(names) if network.is_here(address(name))), None)


def way_between(names: Sequence[str], node: int) -> str | None:
    """Return the interface of host number `node` that leads to the others."""
    return network.interface_to(address(names[1 if node == 0 else 0]))


def ssh_argv(ssh: Sequence[str], host: str, command: Sequence[str]) -> list[str]:
    """Return the call of ssh: it hands its words to a shell over there, so they are quoted once."""
    # The terminal takes the remote side down with us where a connection breaks.
    return [*ssh, "-tt", host, shlex.join(command)]


def start(commands: Mapping[str, Sequence[str]], *, log: Path, stop_file: Path, patience_s: float) -> None:
    """Start one command for each host, and wait; raise TrainingError with the exit code of the first host.

    A host that is cut off is started again while the others go on, for `patience_s` where all are. Ctrl-C asks the
    workers to leave with a checkpoint, once more ends them at once.
    """
    lines: list[_Line] = []
    with log.open("ab") as out:
        try:
            for host, command in commands.items():
                lines.append(_Line(host, command, out=out))
            _wait(lines, log=log, stop_file=stop_file, patience_s=patience_s)
        finally:
            for line in lines:
                line.end()


class _Line:
    """The command of one host."""

    def __init__(self, host: str, command: Sequence[str], *, out: BinaryIO) -> None:
        self.host, self._command, self._out = host, command, out
        self._ended: float | None = None
        self._cut_off: float | None = None  # since when no connection has lasted
        self._process = self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        self._begun = time.monotonic()
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._out,
            start_new_session=True,
        )

    def look(self, now: float) -> int | None:
        """Return the exit code of a host that is through; one that was cut off begins again."""
        code = self._process.poll()
        if code is None:
            if now - self._begun > _CONNECTED_S:
                self._cut_off = None
            return None
        self._ended = now if self._ended is None else self._ended
        # The launcher of the broken connection may not have noticed, or be saving: it still holds the run.
        is_held = self._cut_off is not None and code == RunDirError.exit_code
        if code >= 0 and code not in _CUT_OFF and not is_held:
            return code
        if self._cut_off is None:
            self._cut_off = now
            print(f"meshwright: host {self.host} is cut off; entering it again", file=sys.stderr)
        if now - self._ended > _AGAIN_S:
            self._process, self._ended = self._begin(), None
        return None

    def through_s(self, now: float) -> float:
        """Return since when it has ended."""
        return 0.0 if self._ended is None else now - self._ended

    def cut_off_s(self, now: float) -> float:
        """Return since when no connection to it has lasted."""
        return 0.0 if self._cut_off is None else now - self._cut_off

    def end(self) -> None:
        """Take it down, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _wait(lines: Sequence[_Line], *, log: Path, stop_file: Path, patience_s: float) -> None:
    asked, first = False, lines[0]
    while True:
        try:
            time.sleep(_LOOK_S)
            now = time.monotonic()
            codes = {line: line.look(now) for line in lines}
            # The first host leads: what another one ends with is mostly its word.
            late = first.through_s(now) > _PATIENCE_S
            for line, code in codes.items():
                if code and (line is first or line.through_s(now) > _PATIENCE_S):
                    raise TrainingError(f"host {line.host} ended with exit code {code}; see {log}")
            # One host that is away is missed by the first one, or the first one by the others; nobody misses all.
            if all(line.cut_off_s(now) > patience_s for line in lines):
                raise TrainingError(
                    f"no host could be entered for supervise.host_wait_s={patience_s:g} s; see {log}"
                )
            if codes[first] == 0 and (late or None not in codes.values()):
                return
        except KeyboardInterrupt:
            if asked:
                raise
            asked = True
            stop_file.touch()
            print("meshwright: stopping with a checkpoint; once more to end at once", file=sys.stderr)


def address(host: str) -> str:
    """Return the address in `user@host`."""
    return host.rpartition("@")[2]


def quoted(command: Sequence[str]) -> str:
    """Return what to type in a shell."""
    return shlex.join(command)


def shown(commands: Mapping[str, Sequence[str]]) -> str:
    """Return what to type on each host."""
    return "\n".join(f"# on {host}\n{quoted(command)}" for host, command in commands.items())
