"""The folder of a sweep: sweep.json, written last, and a run directory for each point. What happened is in the runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from launcher import freeze, run_dir
from launcher.decode import decode, encode
from launcher.errors import ConfigError, RunDirError
from launcher.files import write_whole
from launcher.freeze import Decision
from launcher.output import Output
from launcher.run_dir import RunDir, open_run
from launcher.sweep.points import Dropped, Expansion

FILE, PAGE = "sweep.json", "sweep.html"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One point as sweep.json names it."""

    name: str  # of its run directory
    words: tuple[str, ...]  # its overrides that not all others share
    shown: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What sweep.json holds: what was asked, and what became of it."""

    format: int
    created: str  # UTC, ISO 8601
    command: tuple[str, ...]
    flags: tuple[str, ...]  # of Hydra
    words: tuple[str, ...]  # that all points share
    place: Literal["local", "slurm"]
    max_parallel: int | None
    steps: int | None  # of a trial; None: training.num_steps
    points: tuple[Entry, ...]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, kw_only=True)
class SweepDir:
    """A sweep that was written."""

    path: Path
    record: Record

    @property
    def page(self) -> Path:
        """The ranking as a page."""
        return self.path / PAGE

    def run(self, entry: Entry) -> RunDir:
        """Open the run of one point."""
        return open_run(self.path / entry.name)


def is_sweep(path: Path) -> bool:
    """Tell whether a sweep was written here."""
    return (path / FILE).is_file()


def open_sweep(path: Path) -> SweepDir:
    """Read a sweep's folder, or say in one sentence why it is none."""
    try:
        data = json.loads((path / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirError(
            f"{path} is not the folder of a sweep: {FILE} is missing; give the folder that `meshwright sweep` printed"
        ) from error
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path / FILE} cannot be read; the folder of the sweep is damaged") from error
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise RunDirError(f"{path / FILE} has format {data.get('format')}; this version reads {FORMAT}")
    try:
        return SweepDir(path=path.absolute(), record=decode(Record, data, "sweep"))
    except ConfigError as error:
        raise RunDirError(f"{path / FILE} is damaged: {error}") from error


def place_of(expansion: Expansion) -> Path:
    """Return the folder that a sweep is written to; raise RunDirError where that is taken."""
    job = expansion.job
    if job.run_dir is None:
        return run_dir.default_path(model=job.model.name, strategy="sweep", root=Path.cwd())
    path = Path(job.run_dir).expanduser().resolve()
    if is_sweep(path):
        raise RunDirError(
            f"run_dir={path} already holds a sweep; continue it with `meshwright resume {path}`, or choose another"
        )
    run_dir.check_free(path)
    return path


def entries_of(expansion: Expansion) -> tuple[Entry, ...]:
    """Return the points under the names that their run directories get."""
    return tuple(
        Entry(name=f"{number:02d}-{point.label}".rstrip("-"), words=point.words, shown=point.shown)
        for number, point in enumerate(expansion.points, start=1)
    )


def create(expansion: Expansion, *, path: Path, command: Sequence[str]) -> SweepDir:
    """Freeze every point and write sweep.json behind them; after a fault nothing is left."""
    entries = entries_of(expansion)
    sweep = SweepDir(path=path, record=_record(expansion, entries, command))
    descriptor = _claim(sweep)
    try:
        for entry, point in zip(entries, expansion.points, strict=True):
            decision = _placed(point.decision, path / entry.name, group=path.name)
            freeze.write(decision, _Silent(as_json=False), in_full=False, runs_here=False)
        write_whole(path / FILE, json.dumps(encode(sweep.record), indent=2) + "\n")
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunDirError(
                f"run_dir={path} cannot be written: {error.strerror}; choose a writable folder"
            ) from error
        raise
    finally:
        os.close(descriptor)
    return sweep


def _claim(sweep: SweepDir) -> int:
    """Take the folder before anything is written: what lies in it after a fault is ours to remove."""
    try:
        sweep.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"run_dir={sweep.path} cannot be written: {error.strerror}; choose a writable folder"
        ) from error
    descriptor = lock(sweep)
    if is_sweep(sweep.path):
        os.close(descriptor)
        raise RunDirError(f"run_dir={sweep.path} was taken by another sweep a moment ago; choose another")
    return descriptor


def lock(sweep: SweepDir) -> int:
    """Take the sweep for this process until the returned descriptor is closed."""
    try:
        return run_dir.lock(RunDir(path=sweep.path))
    except RunDirError as error:
        raise RunDirError(
            f"{sweep.path} is being gone on with by another `meshwright sweep` or `resume`, or cannot be locked; "
            "wait for that one, or stop it with Ctrl-C"
        ) from error


class _Silent(Output):
    """Points are told of by the table of the sweep."""

    def say(self, text: str) -> None:
        """Say nothing."""


def _record(expansion: Expansion, entries: tuple[Entry, ...], command: Sequence[str]) -> Record:
    job = expansion.job
    assert job.submit.name in ("local", "slurm"), "expand() lets no other place pass"
    return Record(
        format=FORMAT,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=tuple(command),
        flags=expansion.flags,
        words=expansion.words,
        place=job.submit.name,
        max_parallel=job.sweep.max_parallel,
        steps=job.sweep.steps,
        points=entries,
        dropped=expansion.dropped,
    )


def _placed(decision: Decision, path: Path, *, group: str) -> Decision:
    """Return the decision for its folder; W&B shows the points of a sweep as one group."""
    monitor = decision.job.monitor
    job = replace(decision.job, monitor=replace(monitor, wandb_group=monitor.wandb_group or group))
    return replace(decision, job=job, path=path)
