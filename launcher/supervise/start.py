"""One start of the workers of a frozen run, watched until its end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import heartbeat
from launcher.cluster import detect
from launcher.environments.interpreter import find
from launcher.errors import TrainingError
from launcher.heartbeat import Beat
from launcher.run_dir import RunDir, forget_start
from launcher.submit import hosts, local
from launcher.supervise import processes
from launcher.supervise.notes import Death
from launcher.supervise.others import Lost, Others
from launcher.supervise.stop_requests import StopRequests
from launcher.supervise.watch import Culprit, Stall, Watch, culprit

_LINGER_S = 60.0  # torchrun kills after 30 s whom it has asked to leave
_STDERR = 2  # a descriptor: sys.stderr may be somebody's replacement without one


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Ranks that stood still until they were killed."""

    stall: Stall
    culprit: Culprit


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a start ended."""

    code: int  # of torchrun, or of the worker where there is one only; negative: a signal
    world_size: int
    log: Path  # what they and torchrun said on stderr
    log_from: int  # where this start begins in it
    beats: tuple[Beat, ...]
    hang: Hang | None = None
    deaths: tuple[Death, ...] = ()  # on other hosts
    lost: tuple[Lost, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of one host, under way."""

    process: subprocess.Popen[bytes]
    log: Path  # what they and torchrun say on stderr
    log_from: int  # where that begins


def start(
    run: RunDir,
    requests: StopRequests,
    *,
    quiet_stdout: bool,
    export: Path | None,
    lock: int,
    on_look: Callable[[], None],  # called while we wait
    others: Others,
) -> Ending:
    """Start the workers, to train or to export, and wait for their end; a hang is ended by us."""
    forget_start(run)
    command, environment = _command(run, export=export)
    # An export leaves the state of the run as it was.
    run.log_event("launched" if export is None else "exporting", command=command)
    others.run()
    workers = spawn(
        run, requests, command, environment=environment, quiet_stdout=quiet_stdout, lock=lock, node=0
    )
    world_size = run.plan().world_size
    watch = Watch(run.heartbeats, run.job().supervise, world_size=world_size, now=time.monotonic())
    hang, is_over_elsewhere = _wait(run, workers.process, watch, on_look, others)
    code = workers.process.wait()
    requests.process = None
    if code != 0:
        processes.end(run)
    others.settle(at_once=hang is not None or bool(others.lost))
    return Ending(
        code=others.code or TrainingError.exit_code if is_over_elsewhere else code or others.code,
        world_size=world_size,
        log=workers.log,
        log_from=workers.log_from,
        beats=tuple(heartbeat.read_all(run.heartbeats, world_size=world_size)),
        hang=hang,
        deaths=tuple(others.deaths),
        lost=tuple(others.lost),
    )


def spawn(
    run: RunDir,
    requests: StopRequests,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    quiet_stdout: bool,
    lock: int,
    node: int,
) -> Workers:
    """Start the workers of this host, in a session of their own: Ctrl-C reaches only us, and they get time to save."""
    log = run.logs / ("stderr.log" if node == 0 else f"stderr_node_{node:05d}.log")
    with log.open("ab") as stderr:
        log_from = stderr.tell()
        requests.process = subprocess.Popen(
            command,
            env={**environment, local.LAUNCHER_PID: str(os.getpid())},
            stderr=stderr,
            stdout=_STDERR if quiet_stdout else None,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return Workers(process=requests.process, log=log, log_from=log_from)


def _command(run: RunDir, *, export: Path | None) -> tuple[list[str], dict[str, str]]:
    job, plan = run.job(), run.plan()
    if job.cluster.num_nodes > 1:
        return command_on_hosts(run, node=0)
    local.check_port(job.submit.port)
    python = find(run.interpreter(), record=run.env_file)
    command = local.argv(run_dir=run.path, num_processes=plan.world_size, port=job.submit.port, python=python)
    if export is not None:
        command += [local.EXPORT, str(export)]
    return command, _environment(run, python=python, interface="lo")


def command_on_hosts(run: RunDir, *, node: int) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of the workers of host number `node` of several."""
    job = run.job()
    names = hosts.of_run(run)
    python = find(run.interpreter(), record=run.env_file)
    command = hosts.torchrun_argv(run.path, job=job, hosts=names, node=node, python=python)
    return command, _environment(run, python=python, interface=hosts.way_between(names, node))


def _environment(run: RunDir, *, python: str, interface: str | None) -> dict[str, str]:
    cluster = run.job().cluster
    environment = local.environment(
        os.environ,
        num_processes=cluster.gpus_per_node,
        num_cores=detect.count_cores(),
        python=python,
        interface=interface,
    )
    if cluster.gpu.device == "cuda":
        environment = {**local.flight_recorder(run.logs), **environment}
    return environment


def _wait(
    run: RunDir,
    process: subprocess.Popen[bytes],
    watch: Watch,
    on_look: Callable[[], None],
    others: Others,
) -> tuple[Hang | None, bool]:
    """Wait for the end; where ranks stand still, have it told by them and end it.

    The second answer: we ended them for what happened on another host.
    """
    while True:
        try:
            process.wait(watch.interval_s)
            return None, False
        except subprocess.TimeoutExpired:
            stall = watch.look(time.monotonic())
        on_look()
        trouble = others.trouble(watch.last_beat)
        if trouble is not None:
            if trouble == "ended" and _ends_by_itself(process):
                return None, False
            _kill(process)
            return None, True
        if stall is None:
            continue
        beats = [beat for beat in stall.beats if beat.rank in others.own_ranks]
        if processes.gone(beats) and _ends_by_itself(process):
            return None, False
        stopped, busy = others.examine()
        halted = [*processes.stopped(beats), *stopped]
        processes.dump_flight_recorder(run, [beat.rank for beat in beats])
        found = culprit(stall, stopped=halted, busy={**processes.dump_stacks(run, beats), **busy})
        _kill(process)
        return Hang(stall=stall, culprit=found), False


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # and be the one who hears of its end, before its workers follow
    process.wait()


def _ends_by_itself(process: subprocess.Popen[bytes]) -> bool:
    """Give torchrun the time it takes to end the ranks that are left."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_LINGER_S)
    return process.returncode is not None
