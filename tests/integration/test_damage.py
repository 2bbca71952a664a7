"""Damage to checkpoints of real engines, drawn from a seed: never loaded, always said, the one before is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.run_dir import RunDir, open_run

SMALL = (
    *("monitor=none", "cluster.gpus_per_node=2", "data.max_bytes=300000", "model.num_layers=2"),
    *("model.hidden_size=48", "model.ffn_hidden_size=96", "training.sequence_length=32"),
    *("training.global_batch_size=4", "training.num_steps=12", "stop_at_step=8", "plan.num_microbatches=1"),
    *("evaluation.num_sequences=4", "checkpoint.interval=4"),
)
ENGINES = {
    "ddp": ("strategy=accelerate", "plan.zero_stage=0"),
    "fsdp2": ("strategy=accelerate", "plan.zero_stage=3"),
    "deepspeed": ("strategy=deepspeed", "plan.zero_stage=2"),
    "megatron": ("strategy=megatron", "plan.tp=2"),
}
CASES_OF_AN_ENGINE = 54
Damage = Callable[[Path, random.Random], None]


def any_file(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))


def full_file(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size))


def truncate(checkpoint: Path, draw: random.Random) -> None:
    file = full_file(checkpoint, draw)
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip_a_bit(checkpoint: Path, draw: random.Random) -> None:
    file = full_file(checkpoint, draw)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def zero_a_block(checkpoint: Path, draw: random.Random) -> None:
    file = full_file(checkpoint, draw)
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    block = bytes(byte ^ 0xFF for byte in content[start : start + 512])
    content[start : start + 512] = block
    file.write_bytes(content)


def append(checkpoint: Path, draw: random.Random) -> None:
    with any_file(checkpoint, draw).open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))


def empty(checkpoint: Path, draw: random.Random) -> None:
    full_file(checkpoint, draw).write_bytes(b"")


def delete_a_file(checkpoint: Path, draw: random.Random) -> None:
    any_file(checkpoint, draw).unlink()


def delete_the_manifest(checkpoint: Path, draw: random.Random) -> None:
    (checkpoint / "manifest.json").unlink()


def edit_the_manifest(checkpoint: Path, draw: random.Random) -> None:
    file = checkpoint / "manifest.json"
    record = json.loads(file.read_text())
    key = draw.choice(["step", "consumed_samples", "data", "files", "versions", "created"])
    changed = {"step": 9, "consumed_samples": 1, "data": "other", "files": [], "versions": {}, "created": ""}
    record[key] = changed[key]
    file.write_text(json.dumps(record, indent=1) + "\n")


def delete_the_engines_folder(checkpoint: Path, draw: random.Random) -> None:
    shutil.rmtree(checkpoint / "engine")


def swap_two_files(checkpoint: Path, draw: random.Random) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    first = draw.choice(files)
    second = draw.choice([file for file in files if file.read_bytes() != first.read_bytes()])
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)


def put_an_older_file_in(checkpoint: Path, draw: random.Random) -> None:
    older = checkpoint.with_name("step_0000000004")
    same = [path.relative_to(older) for path in older.rglob("*") if path.is_file()]
    names = [n for n in same if (checkpoint / n).exists()]
    names = [n for n in names if (older / n).read_bytes() != (checkpoint / n).read_bytes()]
    name = draw.choice(sorted(names))
    shutil.copy(older / name, checkpoint / name)


def put_a_file_more_in(checkpoint: Path, draw: random.Random) -> None:
    file = any_file(checkpoint, draw)
    shutil.copy(file, file.with_name(f"more_{file.name}"))


def make_a_file_a_link(checkpoint: Path, draw: random.Random) -> None:
    file = any_file(checkpoint, draw)
    elsewhere = checkpoint.parents[1] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def leave_half_renamed(checkpoint: Path, draw: random.Random) -> None:
    """Half of what was to be moved has moved, on a file system that renames file by file."""
    aside = checkpoint.with_name(f"{checkpoint.name}.tmp")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for file in draw.sample(files, max(1, len(files) // 2)):
        target = aside / file.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


def never_renamed(checkpoint: Path, draw: random.Random) -> None:
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.tmp"))


def give_it_another_name(checkpoint: Path, draw: random.Random) -> None:
    checkpoint.rename(checkpoint.with_name(f"step_{draw.randrange(9, 99):010d}"))


def make_it_a_file(checkpoint: Path, draw: random.Random) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


DAMAGES: tuple[Damage, ...] = (
    *(truncate, flip_a_bit, zero_a_block, append, empty, delete_a_file, delete_the_manifest),
    *(edit_the_manifest, delete_the_engines_folder, swap_two_files, put_an_older_file_in),
    *(put_a_file_more_in, make_a_file_a_link, leave_half_renamed, never_renamed, give_it_another_name),
    make_it_a_file,
)


@pytest.fixture(scope="module", params=ENGINES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shell: Callable[..., Any]
) -> RunDir:
    """A run that stopped with two checkpoints, the older of them written beside the training."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    outcome = shell("train", *SMALL, *ENGINES[request.param], f"run_dir={path}")
    assert outcome.code == 0, outcome.err
    run = open_run(path)
    tiers = run.tiers(run.job().checkpoint)
    assert [tiers.verify(path).step for path in tiers.committed()] == [8, 4]
    return run


def copy_of(run: RunDir, path: Path) -> RunDir:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(run.path, path, symlinks=True)
    return RunDir(path=path)


def test_no_damage_is_loaded(trained: RunDir, tmp_path: Path) -> None:
    draw = random.Random(trained.plan().strategy)
    kinds = [DAMAGES[index % len(DAMAGES)] for index in range(CASES_OF_AN_ENGINE)]
    for index, damage in enumerate(kinds):
        run = copy_of(trained, tmp_path / "run")
        both = index % 6 == 5
        for step in (8, 4) if both else (8,):
            victim = run.checkpoints / f"step_{step:010d}"
            kind = damage if step == 8 else delete_a_file
            kind(victim, draw)
        heard: list[str] = []
        best = run.tiers(run.job().checkpoint).latest_good(heard.append)
        label = f"{damage.__name__} ({index})"
        assert (None if best is None else best[1].step) == (None if both else 4), label
        # What no longer looks like a checkpoint at all is not one that was skipped.
        gone = damage in (never_renamed, make_it_a_file)
        assert len(heard) == (not gone) + both, label
        assert all("\n" not in sentence and str(run.path) in sentence for sentence in heard), label


@pytest.mark.parametrize("trained", ["fsdp2", "megatron"], indirect=True)
def test_a_resume_falls_back_or_stops_with_the_reason(
    trained: RunDir, tmp_path: Path, shell: Callable[..., Any]
) -> None:
    run = copy_of(trained, tmp_path / "run")
    draw = random.Random(1)
    flip_a_bit(run.checkpoints / "step_0000000008", draw)
    outcome = shell("resume", str(run.path))
    assert outcome.code == 0, outcome.err
    (resumed,) = [event for event in run.events() if event["event"] == "resumed"]
    assert resumed["step"] == 4
    lost = [event for event in run.events() if event["event"] == "lost"]
    assert [event["steps"] for event in lost] == [4]
    for path in run.checkpoints.glob("step_*"):
        truncate(path, draw)
    events = len(list(run.events()))
    outcome = shell("resume", str(run.path))
    assert outcome.code == 6, outcome.err
    assert "none of the 2 checkpoints" in outcome.err.strip().splitlines()[-1]
    assert all(event["event"] != "started" for event in list(run.events())[events:])
