"""The manifest: what a checkpoint is of and every file it needs, sealed by a checksum of its own bytes."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from launcher.checkpoint.files import MANIFEST, FileEntry, fsync
from launcher.decode import decode, encode
from launcher.errors import CheckpointError, ConfigError
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

FORMAT = 2
# The fields that decide how an engine cuts its files; the others may change between two starts of a run. What of
# them may change as well, the engine says when it saves (Capabilities.reshardable).
LAYOUT = (
    *("dp", "tp", "pp", "vp", "cp", "ep", "etp", "zero_stage", "rank_order"),
    *("offload_optimizer", "offload_parameters"),
)
# The last key of the file. Its value is the CRC-32 of all bytes of the file with zeros in its place.
_SEAL = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')
_UNSEALED = b'"crc32": "00000000"\n}\n'


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written last: no manifest, no checkpoint."""

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


def write(directory: Path, manifest: Manifest) -> None:
    """Put the sealed manifest into `directory`, and all names in there on disk."""
    aside = directory / f"{MANIFEST}.part"
    aside.write_bytes(sealed(encode(manifest)))
    fsync(aside)
    aside.replace(directory / MANIFEST)
    for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
        fsync(path)


def sealed(record: Mapping[str, object]) -> bytes:
    """Return the file's bytes for a manifest as plain data."""
    ordered = {**{key: value for key, value in record.items() if key != "crc32"}, "crc32": "00000000"}
    content = (json.dumps(ordered, indent=1) + "\n").encode()
    return content[: -len(_UNSEALED)] + _UNSEALED.replace(b"00000000", b"%08x" % zlib.crc32(content))


def read(directory: Path) -> Manifest:
    """Return the manifest of `directory`; raise CheckpointError with one sentence unless it is as it was written."""
    file = directory / MANIFEST
    try:
        content = file.read_bytes()
        record = json.loads(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: this checkpoint was never finished") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    written = record.get("format") if isinstance(record, dict) else None
    if isinstance(written, int) and written != FORMAT:
        raise CheckpointError(
            f"{file} has format={written}, this version reads {FORMAT}; use the meshwright that wrote it"
        )
    seal = _SEAL.search(content)
    if seal is None or zlib.crc32(content[: seal.start()] + _UNSEALED) != int(seal[1], 16):
        raise CheckpointError(
            f"{file} does not have the checksum it ends with: it changed after it was written"
        )
    try:
        return decode(Manifest, {key: value for key, value in record.items() if key != "crc32"})
    except ConfigError as error:
        raise CheckpointError(f"{file} is not a manifest: {error}") from error


def check_belongs(manifest: Manifest, *, plan: Plan, model: ModelSpec, dataset_hash: str) -> None:
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
