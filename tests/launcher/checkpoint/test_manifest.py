from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoint import FileEntry, Manifest, check_belongs, manifest
from launcher.decode import encode
from launcher.errors import CheckpointError


def test_what_was_written_is_read(tmp_path: Path, content: Manifest) -> None:
    whole = replace(content, files=(FileEntry(path="engine/a", size=3, crc32=7),), reshardable=("dp",))
    manifest.write(tmp_path, whole)
    assert manifest.read(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_every_bit_of_it_is_sealed(tmp_path: Path, content: Manifest) -> None:
    manifest.write(tmp_path, content)
    file = tmp_path / "manifest.json"
    whole = file.read_bytes()
    draw = random.Random(0)
    positions = [*range(len(whole) - 30, len(whole)), *draw.sample(range(len(whole) - 30), 200)]
    for position in positions:
        for bit in draw.sample(range(8), 2):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                manifest.read(tmp_path)
    for changed in (whole[:-1], whole + b"\n", whole.replace(b" ", b"", 1), b"", b"{}\n"):
        file.write_bytes(changed)
        with pytest.raises(CheckpointError):
            manifest.read(tmp_path)


def test_sealing_again_makes_it_good(tmp_path: Path, content: Manifest) -> None:
    manifest.write(tmp_path, content)
    (tmp_path / "manifest.json").write_bytes(manifest.sealed({**encode(content), "consumed_samples": 161}))
    assert manifest.read(tmp_path).consumed_samples == 161


def test_the_same_run_belongs(content: Manifest) -> None:
    # What leaves the engine's files as they are may change between two starts.
    plan = replace(content.plan, micro_batch_size=1, num_microbatches=4, recompute="full", engine={})
    model = replace(content.model, name="renamed")
    check_belongs(content, plan=plan, model=model, dataset_hash="abc123")


def test_every_difference_is_listed(content: Manifest) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_belongs(
            content,
            plan=replace(content.plan, dp=4, zero_stage=1),
            model=replace(content.model, num_layers=3),
            dataset_hash="def456",
        )
    for part in (
        "checkpoint step 20 does not belong to this run",
        "plan.dp: 2 in the checkpoint, 4 now",
        "plan.zero_stage: 0 in the checkpoint, 1 now",
        "model.num_layers: 2 in the checkpoint, 3 now",
        "data: abc123 in the checkpoint, def456 now",
    ):
        assert part in str(caught.value)
    assert "plan.tp" not in str(caught.value)


def test_an_engine_that_reshards_takes_another_split_but_not_another_engine(content: Manifest) -> None:
    content = replace(content, reshardable=("dp", "zero_stage"))
    other = replace(content.plan, dp=4, zero_stage=3)
    check_belongs(content, plan=other, model=content.model, dataset_hash="abc123")
    with pytest.raises(CheckpointError, match=r"plan\.strategy: fake in the checkpoint, deepspeed now"):
        check_belongs(
            content,
            plan=replace(other, strategy="deepspeed"),
            model=content.model,
            dataset_hash="abc123",
        )
    with pytest.raises(CheckpointError, match=r"plan\.tp: 2 in the checkpoint, 1 now"):
        check_belongs(content, plan=replace(content.plan, tp=1), model=content.model, dataset_hash="abc123")
