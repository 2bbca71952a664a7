"""One start of the workers of a frozen run, watched until its end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import heartbeat
from launcher.environments.interpreter import find
from launcher.heartbeat import Beat
from launcher.run_dir import RunDir
from launcher.submit import local
from launcher.supervise import processes
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
    stderr_from: int  # where this start begins in logs/stderr.log
    beats: tuple[Beat, ...]
    hang: Hang | None = None


def start(
    run: RunDir,
    requests: StopRequests,
    *,
    quiet_stdout: bool,
    export: Path | None,
    lock: int,
    on_look: Callable[[], None],  # called while we wait
) -> Ending:
    """Start the workers, to train or to export, and wait for their end; a hang is ended by us."""
    _forget_last_start(run)
    command, environment = _command(run, export=export)
    job, world_size = run.job(), run.plan().world_size
    # An export leaves the state of the run as it was.
    run.log_event("launched" if export is None else "exporting", command=command)
    with (run.logs / "stderr.log").open("ab") as stderr:
        stderr_from = stderr.tell()
        # A session of its own: Ctrl-C reaches only us, and the workers get time to save.
        requests.process = subprocess.Popen(
            command,
            env=environment,
            stderr=stderr,
            stdout=_STDERR if quiet_stdout else None,
            start_new_session=True,
            pass_fds=(lock,),
        )
        watch = Watch(run.heartbeats, job.supervise, world_size=world_size, now=time.monotonic())
        hang = _wait(run, requests.process, watch, on_look)
        code = requests.process.wait()
    requests.process = None
    if code != 0:
        processes.end(run)
    beats = tuple(heartbeat.read_all(run.heartbeats, world_size=world_size))
    return Ending(code=code, world_size=world_size, stderr_from=stderr_from, beats=beats, hang=hang)


def _command(run: RunDir, *, export: Path | None) -> tuple[list[str], dict[str, str]]:
    job, plan = run.job(), run.plan()
    local.check_port(job.submit.port)
    python = find(run.interpreter(), record=run.env_file)
    command = local.argv(run_dir=run.path, num_processes=plan.world_size, port=job.submit.port, python=python)
    if export is not None:
        command += [local.EXPORT, str(export)]
    environment = local.environment(
        os.environ,
        num_processes=plan.world_size,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        python=python,
    )
    if job.cluster.gpu.device == "cuda":
        environment = {**local.flight_recorder(run.logs), **environment}
    return command, {**environment, local.LAUNCHER_PID: str(os.getpid())}


def _wait(
    run: RunDir, process: subprocess.Popen[bytes], watch: Watch, on_look: Callable[[], None]
) -> Hang | None:
    """Wait for the end; where ranks stand still, have it told by them and end it."""
    while True:
        try:
            process.wait(watch.interval_s)
            return None
        except subprocess.TimeoutExpired:
            stall = watch.look(time.monotonic())
        on_look()
        if stall is not None and processes.gone(stall.beats) and _ends_by_itself(process):
            return None
        if stall is not None:
            halted = processes.stopped(stall.beats)
            processes.dump_flight_recorder(run, [beat.rank for beat in stall.beats])
            found = culprit(stall, stopped=halted, busy=processes.dump_stacks(run, stall.beats))
            process.kill()  # and be the one who hears of its end, before its workers follow
            process.wait()
            return Hang(stall=stall, culprit=found)


def _ends_by_itself(process: subprocess.Popen[bytes]) -> bool:
    """Give torchrun the time it takes to end the ranks that are left."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_LINGER_S)
    return process.returncode is not None


def _forget_last_start(run: RunDir) -> None:
    heartbeat.clear(run.heartbeats)
    for path in run.errors.glob("rank_*"):
        path.unlink()
