"""Run the workers of a frozen run, pass on stop requests, and explain in one sentence how they ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.errors import (
    BY_EXIT_CODE,
    HUNG_UP,
    INTERRUPTED,
    TERMINATED,
    LauncherError,
    RunDirError,
    TrainingError,
)
from launcher.interpreter import find
from launcher.run_dir import RunDir, lock
from launcher.submit import local

_FULL_DISK_BYTES = 2**20
_STDERR = 2  # a descriptor: sys.stderr may be somebody's replacement without one
EXPORT = "--export"  # before the folder, behind RUN_DIR: the workers write the weights and leave
LAUNCHER_PID = "MESHWRIGHT_LAUNCHER_PID"  # told to the workers, who stop when it is gone
_SIGNAL_EXIT_CODES = {signal.SIGHUP: HUNG_UP, signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
# How gloo says that another rank is gone.
_LOST_PEER = re.compile(r"Connection (reset|closed) by peer|connectFullMesh|Broken pipe|Timed out waiting")
# torchrun's summary of a failed rank, the only place that knows a death by signal.
_TORCHRUN_FAILURE = re.compile(r"rank\s+: (?P<rank>\d+) .*?\n\s*exitcode\s+: (?P<code>-?\d+)")


@dataclass
class _StopRequests:
    """Signals seen while the workers run."""

    run: RunDir
    exporting: bool = False
    process: subprocess.Popen[bytes] | None = None
    received: signal.Signals | None = None
    count: int = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.received = self.received or signal.Signals(number)
        if self.count == 1 and not self.exporting:
            self.run.stop_file.touch()
            print(
                "meshwright: stopping after this step with a checkpoint; once more to end at once",
                file=sys.stderr,
            )
        elif self.process is not None:
            # torchrun passes SIGTERM on to its ranks; the third request does not ask anybody.
            _kill(self.process, signal.SIGTERM if self.count <= 2 else signal.SIGKILL)


def run_workers(run: RunDir, *, quiet_stdout: bool, export: Path | None = None) -> int:
    """Start the workers, to train or to export, and wait for them.

    Return 0, 129, 130 or 143; raise what a rank died of.
    """
    job, plan = run.job(), run.plan()
    local.check_port(job.submit.port)
    python = find(run.interpreter(), record=run.env_file)
    descriptor = lock(run)
    _forget_last_start(run)
    command = local.argv(run_dir=run.path, num_processes=plan.world_size, port=job.submit.port, python=python)
    if export is not None:
        command += [EXPORT, str(export)]
    environment = local.environment(
        os.environ,
        num_processes=plan.world_size,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        python=python,
    )
    # An export leaves the state of the run as it was.
    run.log_event("launched" if export is None else "exporting", command=command)
    requests = _StopRequests(run=run, exporting=export is not None)
    with (run.logs / "stderr.log").open("ab") as stderr, _handling(requests):
        start = stderr.tell()
        # A session of its own: Ctrl-C reaches only us, and the workers get time to save.
        requests.process = subprocess.Popen(
            command,
            env={**environment, LAUNCHER_PID: str(os.getpid())},
            stderr=stderr,
            stdout=_STDERR if quiet_stdout else None,
            start_new_session=True,
            pass_fds=(descriptor,),
        )
        code = requests.process.wait()
    os.close(descriptor)
    return _conclude(
        run,
        code=code,
        requests=requests,
        stderr_from=start,
    )


def _conclude(run: RunDir, *, code: int, requests: _StopRequests, stderr_from: int) -> int:
    if requests.exporting and requests.received is not None:
        return _SIGNAL_EXIT_CODES[requests.received]
    finished = next((event["event"] for event in reversed(list(run.events()))), None) == "finished"
    # One request that ends in a fault is a fault: the checkpoint it promised may be missing.
    if requests.received is not None and not finished and (code == 0 or requests.count > 1):
        run.stop_file.unlink(missing_ok=True)
        run.log_event("interrupted", signal=requests.received.name)
        return _SIGNAL_EXIT_CODES[requests.received]
    if code == 0:
        return 0
    failure = explain(run, code=code, stderr_from=stderr_from)
    fault = "export_failed" if requests.exporting else "failed"
    run.log_event(fault, type=type(failure).__name__, message=str(failure), exit_code=failure.exit_code)
    raise failure


def explain(run: RunDir, *, code: int, stderr_from: int = 0) -> LauncherError:
    """The first cause: an error file of a rank, else a signal in torchrun's summary, else the bare exit code."""
    records = sorted(_records(run), key=_cause_first)
    log = run.logs / "stderr.log"
    if records and not _lost_a_peer(records[0]):
        return _from_record(records[0])
    killed = _killed_rank(log, stderr_from=stderr_from) if code > 0 else (0, -code)
    if killed is not None:
        return _from_signal(*killed, log=log)
    if records:
        return _from_record(records[0])
    if shutil.disk_usage(run.path).free < _FULL_DISK_BYTES:
        return RunDirError(
            f"run_dir={run.path}: no space is left on its disk; free some, then `meshwright resume`"
        )
    return TrainingError(f"the workers ended with exit code {code} and left no error file; see {log}")


def _records(run: RunDir) -> Iterator[dict[str, Any]]:
    for path in sorted(run.errors.glob("rank_*.json")):
        with suppress(ValueError):  # a full disk leaves an empty one
            yield json.loads(path.read_text(encoding="utf-8"))


def _killed_rank(log: Path, *, stderr_from: int) -> tuple[int, int] | None:
    """Rank and signal in torchrun's summary: its root cause if that died by one, else another rank.

    torchrun ends the ranks that are left with SIGTERM, so that signal is the last one to believe.
    """
    with log.open("rb") as file:
        file.seek(stderr_from)
        text = file.read().decode("utf-8", errors="replace")
    others, _, root_cause = text.rpartition("Root Cause")
    failures = [*_TORCHRUN_FAILURE.finditer(root_cause), *_TORCHRUN_FAILURE.finditer(others)]
    killed = [(int(found["rank"]), -int(found["code"])) for found in failures if int(found["code"]) < 0]
    return min(killed, key=lambda death: death[1] == signal.SIGTERM, default=None)


def _cause_first(record: dict[str, Any]) -> tuple[bool, float]:
    return _lost_a_peer(record), record["time"]


def _lost_a_peer(record: dict[str, Any]) -> bool:
    """Tell whether a rank merely reports that another one is gone, whose own reason comes first."""
    return record["type"].startswith("Dist") or bool(_LOST_PEER.search(record["message"]))


def _from_record(record: dict[str, Any]) -> LauncherError:
    kind = BY_EXIT_CODE.get(record["exit_code"], LauncherError)
    if kind is not LauncherError:
        return kind(record["message"])
    where = f" at {record['frame']}" if record["frame"] else ""
    reason = f"{record['type']}: {record['message'].splitlines()[0] if record['message'] else ''}".rstrip(
        ": "
    )
    return TrainingError(
        f"rank {record['rank']} on {record['host']} failed{where}: {reason}; full traceback in {record['traceback']}"
    )


def _from_signal(rank: int, number: int, *, log: Path) -> LauncherError:
    name = signal.Signals(number).name
    hint = " (often the host's out-of-memory killer)" if number == signal.SIGKILL else ""
    return TrainingError(
        f"rank {rank} was killed by {name}{hint}; the last good checkpoint is kept and "
        f"`meshwright resume` continues from it, see {log}"
    )


def _forget_last_start(run: RunDir) -> None:
    run.stop_file.unlink(missing_ok=True)
    for path in run.errors.glob("rank_*"):
        path.unlink()


@contextmanager
def _handling(requests: _StopRequests) -> Iterator[None]:
    before = {number: signal.signal(number, requests) for number in _SIGNAL_EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
