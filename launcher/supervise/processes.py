"""The workers as processes of this host: which they are, what they are doing, and their end."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from launcher.heartbeat import Beat
from launcher.run_dir import RunDir
from launcher.submit.local import LAUNCHER_PID

_DUMP_S = 3.0  # a process answers within milliseconds, unless the kernel holds it
_GONE_S = 60.0  # freeing the memory of a GPU takes a while
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in ', re.MULTILINE)
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_ENDED = (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)


def stacks_file(run: RunDir, rank: int) -> Path:
    """Where a rank writes what all its threads are doing, when SIGUSR1 asks it to."""
    return run.logs / f"stacks_rank_{rank:05d}.txt"


def stopped(beats: Sequence[Beat]) -> list[int]:
    """Return the ranks whose processes do not run because somebody stopped them."""
    return [beat.rank for beat in beats if _status(beat.pid) in _STOPPED]


def gone(beats: Sequence[Beat]) -> list[int]:
    """Return the ranks whose processes have ended; then nobody hangs, and torchrun is about to say who died of what."""
    return [beat.rank for beat in beats if _status(beat.pid) in _ENDED]


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def dump_stacks(run: RunDir, beats: Sequence[Beat]) -> dict[int, str]:
    """Let every rank write its stacks; return the ranks that are outside of PyTorch, with the line they are in."""
    before = {beat.rank: _size(stacks_file(run, beat.rank)) for beat in beats}
    for beat in beats:
        with suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGUSR1)
            os.kill(beat.pid, signal.SIGCONT)  # a stopped process hears nothing else
    until = time.monotonic() + _DUMP_S
    while time.monotonic() < until and any(
        _size(stacks_file(run, rank)) == size for rank, size in before.items()
    ):
        time.sleep(0.05)
    places = {rank: _innermost(stacks_file(run, rank), after=size) for rank, size in before.items()}
    return {rank: place for rank, place in places.items() if place and "/torch/" not in place}


def _innermost(file: Path, *, after: int) -> str | None:
    """Return file and line of the main thread's innermost frame, out of what was dumped last."""
    with suppress(OSError):
        text = file.read_bytes()[after:].decode(errors="replace")
        # The thread that runs the signal handler comes under this name: Python's main thread.
        found = _FRAME.search(text.rpartition("Current thread")[2])
        return f"{found['file']}:{found['line']}" if found else None
    return None


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def dump_flight_recorder(run: RunDir, ranks: Collection[int]) -> None:
    """Ask PyTorch's NCCL watchdogs, where there are any, to write which collectives are under way."""
    for rank in ranks:
        with suppress(OSError):  # no pipe, or nobody who reads it: no NCCL
            pipe = os.open(run.logs / f"nccl_pipe_rank_{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, b"1")
            os.close(pipe)


def end(run: RunDir) -> None:
    """Kill what is left of the workers, and wait until they are gone.

    torchrun starts each rank in a session of its own, so a killed torchrun leaves them behind.
    """
    _kill(process for process, launcher in _workers(run) if launcher == os.getpid())


def end_orphans(run: RunDir) -> None:
    """Do the same with workers of `run` whose launcher is gone."""
    _kill(process for process, launcher in _workers(run) if not psutil.pid_exists(launcher))


def _kill(left: Iterable[psutil.Process]) -> None:
    left = list(left)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_GONE_S)


def _workers(run: RunDir) -> Iterator[tuple[psutil.Process, int]]:
    """Yield processes that a launcher on this host has started for `run`, and theirs, with that launcher's number."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            launcher = process.environ().get(LAUNCHER_PID)
            if launcher is not None and str(run.path) in process.cmdline():
                yield process, int(launcher)
