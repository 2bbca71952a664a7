"""Which checkpoints count: written aside, listed in a manifest, renamed into place, checked before use.

RUN_DIR/checkpoints/step_0000000020/{manifest.json, engine/, rng/}. Only rank 0 calls `begin` and `commit`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

from launcher.decode import decode, encode
from launcher.errors import CheckpointError, ConfigError
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

FORMAT = 1
MANIFEST = "manifest.json"

_COMMITTED = re.compile(r"step_(\d{10})")
_LEFTOVER = re.compile(r"step_(\d{10})\.(?:\w+\.)?tmp")
_CHUNK_BYTES = 8 * 2**20
# The fields that decide how an engine cuts its files; the others may change between two starts of a run. What of
# them may change as well, the engine says when it saves (Capabilities.reshardable).
LAYOUT = (
    *("dp", "tp", "pp", "vp", "cp", "ep", "etp", "zero_stage", "rank_order"),
    *("offload_optimizer", "offload_parameters"),
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When to save, and what to keep: the `checkpoint` group of the configuration."""

    interval: int = 0  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest ones kept
    keep_every: int = 0  # steps divisible by it are never pruned; 0: none
    save_last: bool = True  # also after the last step

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last={self.keep_last} must be at least 1, "
                "or no checkpoint would be left to resume from"
            )
        for key, off in (("interval", "0 saves only at the end"), ("keep_every", "0 keeps only the newest")):
            if getattr(self, key) < 0:
                raise ValueError(f"checkpoint.{key}={getattr(self, key)} must not be negative; {off}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint, relative to its folder."""

    path: str
    size: int  # bytes
    crc32: int

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in self.path:
            raise ValueError(
                f"files.path={self.path} leaves the checkpoint's folder; only relative paths are read"
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is of, and every file it needs. Written last: no manifest, no checkpoint."""

    format: int
    step: int  # steps completed
    consumed_samples: int
    plan: Plan
    model: ModelSpec
    training: TrainingSpec
    versions: Mapping[str, str]
    files: tuple[FileEntry, ...]
    created: str  # UTC, ISO 8601
    data: str  # content hash of the dataset
    reshardable: tuple[str, ...] = ()  # keys of the plan in which a run that reads this may differ


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, root: Path, policy: CheckpointPolicy) -> None:
        self.root = root
        self.policy = policy
        self._known_good: set[Path] = set()  # read or written whole by this process

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` lies once it is committed."""
        return self.root / f"step_{step:010d}"

    def committed(self) -> list[Path]:
        """All finished checkpoints, newest first; whether each is good, `verify` tells."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if path.is_dir() and _COMMITTED.fullmatch(path.name)]
        return sorted(found, reverse=True)

    def begin(self, step: int) -> Path:
        """Create a fresh folder aside, with `engine/` and `rng/`, for every rank to write into."""
        aside = self._aside(step)
        with self._writing(step):
            shutil.rmtree(aside, ignore_errors=True)
            for part in ("engine", "rng"):
                (aside / part).mkdir(parents=True)
        return aside

    def commit(
        self,
        step: int,
        *,
        consumed_samples: int,
        plan: Plan,
        model: ModelSpec,
        training: TrainingSpec,
        versions: Mapping[str, str],
        data: str,
        reshardable: Collection[str],
    ) -> Path:
        """Make what lies aside count: checksums, manifest, rename, prune. Call once all ranks wrote."""
        aside, final = self._aside(step), self.path_of(step)
        with self._writing(step):
            files = _list_files(aside)
            if not files:
                raise CheckpointError(
                    f"checkpoint step {step} holds no files: plan.strategy={plan.strategy} saved none"
                )
            manifest = Manifest(
                format=FORMAT,
                step=step,
                consumed_samples=consumed_samples,
                plan=plan,
                model=model,
                training=training,
                versions=versions,
                files=files,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                data=data,
                reshardable=tuple(sorted(reshardable)),
            )
            _write_manifest(aside, manifest)
            if final.exists():  # a damaged one that this run has trained past again
                final.rename(final.with_name(f"{final.name}.replaced.tmp"))
            aside.rename(final)
            _fsync(self.root)
        self._known_good.add(final)
        self.prune()
        return final

    def discard(self, step: int) -> None:
        """Drop what lies aside for `step`, after a rank failed to write its part."""
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def verify(self, path: Path) -> Manifest:
        """Read a checkpoint whole; return its manifest or raise CheckpointError with one sentence."""
        manifest = _read_manifest(path)
        _check_sizes(path, manifest)
        if path.name != self.path_of(manifest.step).name:
            raise CheckpointError(
                f"{path} holds a manifest of step {manifest.step}; give the folder its own name back"
            )
        with ThreadPoolExecutor(max_workers=_num_readers()) as pool:
            checksums = pool.map(lambda entry: _checksum(path / entry.path), manifest.files)
            for entry, checksum in zip(manifest.files, checksums, strict=True):
                if checksum != entry.crc32:
                    raise CheckpointError(
                        f"{path / entry.path} has checksum {checksum:08x}, the manifest says "
                        f"{entry.crc32:08x}: its bytes changed after they were written"
                    )
        self._known_good.add(path)
        return manifest

    def latest_good(self, report: Callable[[str], None]) -> tuple[Path, Manifest] | None:
        """Return the newest checkpoint that verifies, if any; `report` hears of each one skipped and why."""
        for path in self.committed():
            try:
                return path, self.verify(path)
            except CheckpointError as error:
                report(f"skipped checkpoint {path.name}: {error}")
        return None

    def prune(self) -> None:
        """Remove what the policy does not keep; never the newest good one, nor anything newer."""
        paths = self.committed()
        newest = next((path for path in paths if path in self._known_good or self._is_good(path)), None)
        if newest is None:
            return
        older = paths[paths.index(newest) + 1 :]
        kept = [path for path in older if _is_whole(path)][: self.policy.keep_last - 1]
        for path in older:
            every = self.policy.keep_every
            if path not in kept and not (every and _step_of(path) % every == 0):
                self._remove(path)
        for path in self.root.iterdir():
            leftover = _LEFTOVER.fullmatch(path.name)
            if leftover and int(leftover[1]) <= _step_of(newest):
                shutil.rmtree(path, ignore_errors=True)

    def check_belongs(self, manifest: Manifest, *, plan: Plan, model: ModelSpec, dataset_hash: str) -> None:
        """Raise CheckpointError naming every field in which the checkpoint is not this run's."""
        # Weights and data position only make sense with the same model and corpus; a label may change.
        compared = [("model", f.name) for f in fields(ModelSpec) if f.name != "name"]
        compared += [("plan", name) for name in ("strategy", "precision")]
        compared += [("plan", name) for name in LAYOUT if name not in manifest.reshardable]
        now = {"model": model, "plan": plan}
        differences = []
        for group, name in compared:
            then_value, now_value = getattr(getattr(manifest, group), name), getattr(now[group], name)
            if then_value != now_value:
                differences.append(f"{group}.{name}: {then_value} in the checkpoint, {now_value} now")
        if manifest.data != dataset_hash:
            differences.append(f"data: {manifest.data} in the checkpoint, {dataset_hash} now")
        if differences:
            raise CheckpointError(
                f"checkpoint step {manifest.step} does not belong to this run ({'; '.join(differences)}); "
                "restore these values, or start in a new run directory"
            )

    def _aside(self, step: int) -> Path:
        return self.root / f"step_{step:010d}.tmp"

    def _is_good(self, path: Path) -> bool:
        try:
            self.verify(path)
        except CheckpointError:
            return False
        return True

    def _remove(self, path: Path) -> None:
        """Rename before deleting, so that a half-deleted checkpoint never looks like one."""
        doomed = path.with_name(f"{path.name}.removed.tmp")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            # The new checkpoint is safe; a full trash is no reason to stop training.
            _log.warning("could not remove old checkpoint %s: %s", path, error.strerror)
        self._known_good.discard(path)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Turn a full or read-only disk into one sentence, and leave nothing half-written behind."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            self.discard(step)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"could not write checkpoint step {step} under {self.root}: {error.strerror or error}; "
                "free space there or make it writable "
                f"(checkpoint.keep_last={self.policy.keep_last} decides how many stay)"
            ) from error


def _step_of(path: Path) -> int:
    match = _COMMITTED.fullmatch(path.name)
    assert match, f"{path} is not a checkpoint's name"
    return int(match[1])


def _num_readers() -> int:
    return min(8, os.cpu_count() or 1)


def _list_files(directory: Path) -> tuple[FileEntry, ...]:
    """Size and checksum of every file below `directory`, each flushed to disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link; a checkpoint must hold its own files")
        _fsync(path)
    with ThreadPoolExecutor(max_workers=_num_readers()) as pool:
        checksums = pool.map(_checksum, paths)
        return tuple(
            FileEntry(path=path.relative_to(directory).as_posix(), size=path.stat().st_size, crc32=checksum)
            for path, checksum in zip(paths, checksums, strict=True)
        )


def _checksum(path: Path) -> int:
    """CRC-32 of a file, streamed; zlib frees the interpreter lock, so threads help."""
    value = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                value = zlib.crc32(chunk, value)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return value


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    aside = directory / f"{MANIFEST}.part"
    aside.write_text(json.dumps(encode(manifest), indent=1) + "\n", encoding="utf-8")
    _fsync(aside)
    aside.replace(directory / MANIFEST)
    for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
        _fsync(path)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: this checkpoint was never finished") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    written = record.get("format") if isinstance(record, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise CheckpointError(
            f"{file} has format={written}, newer than the {FORMAT} known here; update meshwright"
        )
    try:
        return decode(Manifest, record)
    except ConfigError as error:
        raise CheckpointError(f"{file} is not a manifest: {error}") from error


def _check_sizes(path: Path, manifest: Manifest) -> None:
    root = path.resolve()
    for entry in manifest.files:
        file = path / entry.path
        if not file.resolve().is_relative_to(root):
            raise CheckpointError(f"{file} leads out of the checkpoint's folder; it is not read")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != entry.size:
            raise CheckpointError(f"{file} has {size} bytes, the manifest says {entry.size}")


def _is_whole(path: Path) -> bool:
    """Look at manifest and sizes only: cheap, the data is not read."""
    try:
        _check_sizes(path, _read_manifest(path))
    except CheckpointError:
        return False
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
