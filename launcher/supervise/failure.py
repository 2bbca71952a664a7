"""What a start died of: the first cause out of the ranks' error files, torchrun's summary, signals and beats."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import (
    BY_EXIT_CODE,
    BadLossError,
    CheckpointError,
    DeviceMemoryError,
    HungError,
    LauncherError,
    LostRankError,
    PlanError,
    RunDirError,
    TrainingError,
)
from launcher.run_dir import RunDir
from launcher.supervise.notes import Death
from launcher.supervise.policy import Cause
from launcher.supervise.start import Ending, Hang

_FULL_DISK_BYTES = 2**20
# Signals that follow upon others: NCCL's watchdog aborts a rank that lost its peer, maybe on another host, and torchrun
# ends the ranks that are left with SIGTERM. The later here, the less to believe.
_AFTERMATH: dict[int, int] = {signal.SIGABRT: 1, signal.SIGTERM: 2}
# How gloo and NCCL say that another rank is gone, and that it did not come.
_LOST_PEER = re.compile(
    r"Connection (reset|closed) by peer|connectFullMesh|Broken pipe|remote process exited|NCCL remote error"
)
_TIMED_OUT = re.compile(r"Timed out waiting|collective operation timeout|Watchdog caught", re.IGNORECASE)
_FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded|File too large")
# Our own sentences around whatever ended a save, and what it may be besides a disk that has no room.
_SAVE = re.compile(
    r"could not be written|could not write checkpoint|checkpoint under way was not finished", re.IGNORECASE
)
_UNWRITABLE = re.compile(r"Permission denied|Read-only file system")
_NO_MEMORY = re.compile(
    r"out of memory|\bMemoryError\b|DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory",
    re.IGNORECASE,
)
_TYPE = re.compile(r"\b[A-Z]\w*Error\b")
# torchrun's summary of a failed rank, the only place that knows a death by signal; `srun --label` numbers its lines.
_TORCHRUN_FAILURE = re.compile(r"rank\s+: (?P<rank>\d+) .*?\n(?:\d+:)?\s*exitcode\s+: (?P<code>-?\d+)")
# Exceptions of a program that is wrong: the next start would raise them again.
_MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, SyntaxError),
    *(TypeError, ValueError, NotImplementedError),
)
_CAUSES: dict[type[LauncherError], Cause] = {
    PlanError: "plan_impossible",
    CheckpointError: "corrupt_checkpoint",
    DeviceMemoryError: "out_of_memory",
    LostRankError: "lost_rank",
    HungError: "hang",
    BadLossError: "bad_loss",
    TrainingError: "unknown",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a start ended, for the policy (`cause`) and for a person (`error`)."""

    cause: Cause
    error: LauncherError
    rank: int | None = None
    host: str | None = None
    frame: str | None = None  # file:line, the innermost one that is in no installed package


def explain(run: RunDir, ending: Ending, *, out_of_memory_kills: int = 0) -> Failure:
    """Find the first cause: a hang that we ended, a rank's error file, a signal, else the bare exit code.

    `out_of_memory_kills` are those that the kernel reports for the time of this start.
    """
    if ending.hang is not None and not ending.lost:
        return _from_hang(run, ending.hang)
    records = sorted(_records(run), key=_cause_first)
    if records and not _lost_a_peer(records[0]):
        return _from_record(records[0])
    if ending.lost:
        gone = ending.lost[0]
        return lost_node(gone.host, ranks=gone.ranks, why=gone.why)
    here = deaths(
        ending.code,
        log=ending.log,
        log_from=ending.log_from,
        out_of_memory=out_of_memory_kills > 0,
        alone=ending.world_size == 1,
        hosts={beat.rank: beat.host for beat in ending.beats},
    )
    found = min((*here, *ending.deaths), key=lambda death: _AFTERMATH.get(death.signal, 0), default=None)
    if found is not None:
        return _from_signal(found)
    if records:
        return _from_record(records[0])
    if shutil.disk_usage(run.path).free < _FULL_DISK_BYTES:
        error = RunDirError(
            f"run_dir={run.path}: no space is left on its disk; free some, then `meshwright resume`"
        )
        return Failure(cause="storage_full", error=error)
    text = f"the workers ended with exit code {ending.code} and left no error file; see {ending.log}"
    return Failure(cause="unknown", error=TrainingError(text))


def lost_node(host: str, *, ranks: Sequence[int], why: str) -> Failure:
    """Blame a host that went away with all its ranks, those that are known, or that the others cannot reach."""
    which = f" (rank{_span(ranks)})" if ranks else ""
    error = LostRankError(f"host {host}{which} is lost: {why}")
    return Failure(cause="lost_node", error=error, rank=ranks[0] if ranks else None, host=host)


def _span(ranks: Sequence[int]) -> str:
    return f" {ranks[0]}" if len(ranks) == 1 else f"s {ranks[0]} to {ranks[-1]}"


def _records(run: RunDir) -> Iterator[dict[str, Any]]:
    for path in sorted(run.errors.glob("rank_*.json")):
        with suppress(ValueError):  # a full disk leaves an empty one
            yield json.loads(path.read_text(encoding="utf-8"))


def deaths(
    code: int,
    *,
    log: Path,
    log_from: int,
    out_of_memory: bool,
    alone: bool = False,
    hosts: Mapping[int, str] | None = None,
) -> list[Death]:
    """Return what signals ended: torchrun itself (or, `alone`, the only worker), else ranks that it tells of in `log`.

    In torchrun's summary its root cause comes first. Ranks that are not in `hosts` were on this one.
    """
    host = socket.gethostname()
    found: list[tuple[int | None, int]] = [(0 if alone else None, -code)]
    if code >= 0:
        others, _, root_cause = said(log, log_from).rpartition("Root Cause")
        failures = [*_TORCHRUN_FAILURE.finditer(root_cause), *_TORCHRUN_FAILURE.finditer(others)]
        found = [(int(each["rank"]), -int(each["code"])) for each in failures if int(each["code"]) < 0]
    return [
        Death(
            rank=rank,
            signal=number,
            host=host if hosts is None or rank is None else hosts.get(rank, host),
            log=str(log),
            out_of_memory=out_of_memory,
        )
        for rank, number in found
    ]


def said(log: Path, log_from: int) -> str:
    """Return what a start said; nothing where its log cannot be seen, as from inside a container."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(log_from)
        return file.read().decode("utf-8", errors="replace")
    return ""


def _cause_first(record: dict[str, Any]) -> tuple[bool, float]:
    return _lost_a_peer(record), record["time"]


def _lost_a_peer(record: dict[str, Any]) -> bool:
    """Tell whether a rank merely reports that another one is gone, whose own reason comes first."""
    text = record["message"]
    return record["type"].startswith("Dist") or bool(_LOST_PEER.search(text) or _TIMED_OUT.search(text))


def _from_record(record: dict[str, Any]) -> Failure:
    kind, text = BY_EXIT_CODE.get(record["exit_code"], LauncherError), record["message"]
    cause: Cause | None = None
    if kind is CheckpointError and _SAVE.search(text):
        cause, kind = _of_save(text)
    elif _FULL_DISK.search(text):
        cause = "storage_full"
    if kind is LauncherError:
        kind, text = _kind_of_foreign(record), _sentence(record)
    cause = cause or _CAUSES.get(kind, "user_error")
    if kind is HungError:
        cause = "collective_timeout"
    if kind is TrainingError and _is_mistake(record["type"]):
        cause = "user_error"
    return Failure(
        cause=cause, error=kind(text), rank=record["rank"], host=record["host"], frame=record["frame"]
    )


def _of_save(text: str) -> tuple[Cause, type[LauncherError]]:
    """What a save died of: most faults of training may strike in one as well."""
    if _FULL_DISK.search(text) or _UNWRITABLE.search(text):
        return "storage_full", CheckpointError
    if _NO_MEMORY.search(text):
        return "out_of_memory", DeviceMemoryError
    if _LOST_PEER.search(text):
        return "lost_rank", LostRankError
    if _TIMED_OUT.search(text):
        return "collective_timeout", HungError
    mistaken = any(_is_mistake(name) for name in _TYPE.findall(text))
    return ("user_error" if mistaken else "unknown"), CheckpointError


def _kind_of_foreign(record: dict[str, Any]) -> type[LauncherError]:
    if _TIMED_OUT.search(record["message"]):
        return HungError
    return LostRankError if _lost_a_peer(record) else TrainingError


def _is_mistake(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, _MISTAKES)


def _sentence(record: dict[str, Any]) -> str:
    where = f" at {record['frame']}" if record["frame"] else ""
    message = record["message"].splitlines()[0] if record["message"] else ""
    reason = f"{record['type']}: {message}".rstrip(": ")
    return f"rank {record['rank']} on {record['host']} failed{where}: {reason}; full traceback in {record['traceback']}"


def _from_signal(death: Death) -> Failure:
    rank, host = death.rank, death.host
    who = "torchrun" if rank is None else f"rank {rank}"
    if death.out_of_memory and death.signal == signal.SIGKILL:
        error: LauncherError = DeviceMemoryError(
            f"{who} on {host} was killed by the kernel, out of host memory; use a smaller plan.micro_batch_size, "
            "plan.recompute=full or a higher plan.zero_stage"
        )
        return Failure(cause="out_of_memory", error=error, rank=rank, host=host)
    name = signal.Signals(death.signal).name
    error = LostRankError(f"{who} on {host} was killed by {name}; see {death.log}")
    return Failure(cause="lost_rank", error=error, rank=rank, host=host)


def _from_hang(run: RunDir, hang: Hang) -> Failure:
    stall, rank = hang.stall, hang.culprit.rank
    host = next((beat.host for beat in stall.beats if beat.rank == rank), socket.gethostname())
    error = HungError(
        f"rank {rank} on {host} holds up the run: {hang.culprit.why}; no sign of life for {stall.silent_s:.1f} s "
        f"({stall.key}={stall.limit_s:g}), the stacks of all ranks are in {run.logs}"
    )
    return Failure(cause="hang", error=error, rank=rank, host=host)
