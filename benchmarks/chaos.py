"""Faults on a schedule drawn from a seed, done to a run under way: kills, stops, pauses, full disks."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from launcher import heartbeat
from launcher.monitor.metrics import read
from launcher.run_dir import RunDir
from launcher.submit.local import LAUNCHER_PID
from launcher.supervise.watch import step_reached

Kind = Literal["kill", "kill_in_save", "kill_in_restart", "stop", "pause", "full_disk"]
_LOOK_S = 0.01
_PATIENCE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong: from `at_step` on, `delay_s` after its moment has come."""

    kind: Kind
    at_step: int
    delay_s: float
    draw: float  # 0 to 1: which rank


@dataclass(frozen=True, kw_only=True)
class Done:
    """A fault that was done."""

    fault: Fault
    rank: int | None  # None: torchrun, before there was a rank
    time: float  # unix seconds
    step: int  # steps completed by then


def schedule(
    kinds: Sequence[Kind], *, num_steps: int, restart_s: float, step_s: float, seed: int
) -> list[Fault]:
    """Spread `kinds` over a run; one inside a restart begins with the restart that the fault before it makes."""
    draw = random.Random(seed)
    span = max(1, (num_steps - 2) // len(kinds))
    faults = []
    for index, kind in enumerate(kinds):
        at = 1 + index * span + draw.randrange(span)
        longest = {"kill_in_restart": restart_s, "kill_in_save": step_s}.get(kind, step_s)
        faults.append(Fault(kind=kind, at_step=at, delay_s=draw.uniform(0, longest), draw=draw.random()))
    return faults


class Chaos(threading.Thread):
    """Does the faults to `run` in order; `done` tells which. Ends with the launcher."""

    def __init__(self, run: RunDir, launcher: subprocess.Popen[Any], faults: Sequence[Fault]) -> None:
        super().__init__(daemon=True)
        self._run, self._launcher, self._faults = run, launcher, faults
        self.done: list[Done] = []

    def run(self) -> None:
        for fault in self._faults:
            if not self._wait_for(fault):
                return
            time.sleep(fault.delay_s)
            self._do(fault)

    def _wait_for(self, fault: Fault) -> bool:
        starts = self._num_ended_starts()
        until = time.monotonic() + _PATIENCE_S
        while self._launcher.poll() is None and time.monotonic() < until:
            if self._count("launched") > starts and self._has_come(fault):
                return True
            time.sleep(_LOOK_S)
        return False

    def _num_ended_starts(self) -> int:
        """Count the starts that are over: a fault that ends one leaves victims that are still dying."""
        over = self.done and self.done[-1].fault.kind != "pause"
        return self._count("launched") if over else 0

    def _has_come(self, fault: Fault) -> bool:
        if fault.kind == "kill_in_restart" and self.done:
            return True
        if self._step() < fault.at_step or not self._steps_now():
            return False
        return fault.kind != "kill_in_save" or any(self._run.checkpoints.glob("step_*.tmp"))

    def _do(self, fault: Fault) -> None:
        victims = workers(self._run, launcher=self._launcher.pid)
        if not victims:
            return
        rank = sorted(victims, key=lambda rank: -1 if rank is None else rank)[int(fault.draw * len(victims))]
        process, step = victims[rank], self._step()
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            _deeds[fault.kind](process)
            self.done.append(Done(fault=fault, rank=rank, time=time.time(), step=step))

    def _step(self) -> int:
        return step_reached(list(self._beats()))

    def _steps_now(self) -> bool:
        return any(beat.phase in ("stepping", "saving", "evaluating") for beat in self._beats())

    def _beats(self) -> Iterator[heartbeat.Beat]:
        for path in sorted(self._run.heartbeats.glob("rank_*.json")):
            beat = heartbeat.read(self._run.heartbeats, int(path.stem.removeprefix("rank_")))
            if beat is not None:
                yield beat

    def _count(self, event: str) -> int:
        return sum(found["event"] == event for found in self._run.events())


def workers(run: RunDir, *, launcher: int) -> dict[int | None, psutil.Process]:
    """Return the ranks that run now, by number; before there are any, torchrun under None."""
    found: dict[int | None, psutil.Process] = {}
    agent: dict[int | None, psutil.Process] = {}
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            environment = process.environ()
            if LAUNCHER_PID in environment and str(run.path) in process.cmdline():
                rank = environment.get("RANK")
                (agent if rank is None else found)[None if rank is None else int(rank)] = process
    return found or agent


def _stop(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGSTOP)


def _pause(process: psutil.Process) -> None:
    process.suspend()
    time.sleep(1.0)
    process.resume()


def _fill(process: psutil.Process) -> None:
    """No file may grow beyond a few KiB any more: what a full disk does, for one process and without a mount."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


_deeds: Mapping[Kind, Callable[[psutil.Process], None]] = {
    "kill": psutil.Process.kill,
    "kill_in_save": psutil.Process.kill,
    "kill_in_restart": psutil.Process.kill,
    "stop": _stop,
    "pause": _pause,
    "full_disk": _fill,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run with faults went."""

    code: int
    wall_s: float
    done: tuple[Done, ...]
    err: str
    run: RunDir


def train(words: Sequence[str], faults: Sequence[Fault], *, path: Path, timeout_s: float = 600) -> Outcome:
    """Train `words` into `path` and do the faults meanwhile."""
    command = [sys.executable, "-m", "launcher", "train", *words, f"run_dir={path}"]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launcher:
        chaos = Chaos(RunDir(path=path), launcher, faults)
        chaos.start()
        try:
            _, err = launcher.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            _, err = launcher.communicate(timeout=60)
        chaos.join(timeout=30)
    return Outcome(
        code=launcher.returncode,
        wall_s=time.monotonic() - started,
        done=tuple(chaos.done),
        err=err,
        run=RunDir(path=path),
    )


def trajectory(run: RunDir) -> list[tuple[int, int, float]]:
    """Return (step, consumed samples, loss) of every line of metrics.jsonl."""
    return [(line["step"], line["consumed_samples"], line["loss"]) for line in read(run.metrics_file)]
