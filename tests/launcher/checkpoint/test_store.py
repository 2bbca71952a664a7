from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import CheckpointStore, FileEntry, Manifest, Tiers, files, manifest
from launcher.errors import CheckpointError
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

MODEL = ModelSpec(
    name="tiny",
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=128,
    vocab_size=256,
    max_position_embeddings=128,
    moe=MoeSpec(num_experts=4, top_k=2, expert_ffn_hidden_size=64),
)
TRAINING = TrainingSpec(sequence_length=128, global_batch_size=8, num_steps=20)
PLAN = Plan(strategy="fake", dp=2, tp=2, micro_batch_size=2, num_microbatches=2, engine={"zero": {"x": 1}})


def store_in(root: Path, *, keep_last: int = 2, keep_every: int = 0) -> CheckpointStore:
    return CheckpointStore(root, keep_last=keep_last, keep_every=keep_every)


def commit(store: CheckpointStore, step: int, *, reshardable: frozenset[str] = frozenset()) -> Path:
    aside = store.aside_of(step)
    with store.writing(step):
        found = tuple(files.entries(aside, files.names(aside)))
    return store.commit(
        Manifest(
            format=manifest.FORMAT,
            step=step,
            consumed_samples=8 * step,
            plan=PLAN,
            model=MODEL,
            training=TRAINING,
            versions={"torch": "2.13.0"},
            files=found,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            data="abc123",
            reshardable=tuple(sorted(reshardable)),
        )
    )


def save(store: CheckpointStore, step: int, *, reshardable: frozenset[str] = frozenset()) -> Path:
    aside = store.begin(step)
    (aside / "engine" / "rank_0.bin").write_bytes(bytes([step % 256]) * 1000)
    (aside / "engine" / "deep" / "er").mkdir(parents=True)
    (aside / "engine" / "deep" / "er" / "empty").write_bytes(b"")
    (aside / "rng" / "rank_0.json").write_text('{"seed": 1}')
    return commit(store, step, reshardable=reshardable)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content and seal it again: what is left is wrong by its meaning only."""
    file = path / "manifest.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_bytes(manifest.sealed(record))


def test_what_was_committed_is_found_again_unchanged(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    path = save(store_in(root), 20)
    assert path == root / "step_0000000020"
    found = Tiers(shared=store_in(root)).latest_good(pytest.fail)
    assert found is not None
    where, content = found
    assert where == path
    assert (content.format, content.step, content.consumed_samples) == (2, 20, 160)
    assert (content.plan, content.model, content.training) == (PLAN, MODEL, TRAINING)
    assert content.versions == {"torch": "2.13.0"}
    assert [entry.path for entry in content.files] == [
        "engine/deep/er/empty",
        "engine/rank_0.bin",
        "rng/rank_0.json",
    ]
    assert [entry.size for entry in content.files] == [0, 1000, 11]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(content.created)
    assert abs(age.total_seconds()) < 60


def test_nothing_counts_before_commit(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    aside = store.begin(5)
    assert aside.name == "step_0000000005.tmp"
    assert names(aside) == ["engine", "rng"]
    assert Tiers(shared=store).latest_good(pytest.fail) is None


def test_a_missing_folder_is_no_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path / "never")
    assert Tiers(shared=store).latest_good(pytest.fail) is None
    store.prune()


def test_begin_clears_what_an_earlier_try_left(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    (store.begin(5) / "engine" / "stale.bin").write_bytes(b"old")
    (store.begin(5) / "engine" / "fresh.bin").write_bytes(b"new")
    content = store.verify(commit(store, 5))
    assert [entry.path for entry in content.files] == ["engine/fresh.bin"]


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.begin(5)
    store.discard(5)
    assert names(tmp_path) == []


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.begin(5)
    with pytest.raises(CheckpointError, match="step 5 holds no files"):
        commit(store, 5)
    assert names(tmp_path) == []


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def to_link(file: Path) -> None:
    file.rename(file.parents[2] / "elsewhere")
    file.symlink_to(file.parents[2] / "elsewhere")


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("third"))
    second.rename(first)
    first.with_name("third").rename(second)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda p: (p / "manifest.json").unlink(),
        r"manifest\.json is missing: this checkpoint was never finished",
    ),
    (lambda p: (p / "manifest.json").write_text('{"format": 1, "st'), r"manifest\.json cannot be read"),
    (lambda p: (p / "manifest.json").write_text("[]"), "does not have the checksum it ends with"),
    (lambda p: change_manifest(p, lambda m: m.update(steps=1)), "unknown key 'steps'; did you mean 'step'"),
    (lambda p: change_manifest(p, lambda m: m.pop("data")), "missing key 'data'"),
    (lambda p: change_manifest(p, lambda m: m["plan"].update(dp=0)), "plan.dp=0 must be at least 1"),
    (
        lambda p: change_manifest(p, lambda m: m.update(format=3, novelty=1)),
        "has format=3, this version reads 2; use the meshwright that wrote it",
    ),
    (lambda p: flip(p / "manifest.json", 60), "does not have the checksum it ends with|cannot be read"),
    (lambda p: (p / "engine" / "more.bin").write_bytes(b""), r"more\.bin is not in the manifest"),
    (lambda p: to_link(p / "engine" / "rank_0.bin"), r"rank_0\.bin is a link"),
    (
        lambda p: swap(p / "engine" / "rank_0.bin", p / "rng" / "rank_0.json"),
        "has 11 bytes, the manifest says",
    ),
    (lambda p: (p / "rng" / "rank_0.json").unlink(), r"rng/rank_0\.json is missing"),
    (lambda p: os.truncate(p / "engine" / "rank_0.bin", 999), "has 999 bytes, the manifest says 1000"),
    (lambda p: (p / "engine" / "rank_0.bin").write_bytes(b"\x00" * 1000), r"rank_0\.bin has checksum"),
    (lambda p: change_manifest(p, lambda m: m.update(step=19)), "holds a manifest of step 19"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_damage_is_named_and_the_next_older_one_is_used(
    tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    store = store_in(tmp_path)
    older, newer = save(store, 10), save(store, 20)
    damage(newer)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        store.verify(newer)
    assert "\n" not in str(caught.value)
    heard: list[str] = []
    found = Tiers(shared=store_in(tmp_path)).latest_good(heard.append)
    assert found is not None
    assert found[0] == older
    assert heard == [f"skipped checkpoint step_0000000020 in {tmp_path}: {caught.value}"]


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "engine/../../secret", "", ".", "a\\..\\b"])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, path: str) -> None:
    store = store_in(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "secret").write_bytes(b"x" * 1000)
    committed = save(store, 10)
    change_manifest(committed, lambda m: m["files"][1].update(path=path))
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        store.verify(committed)
    with pytest.raises(ValueError, match="leaves the checkpoint's folder"):
        FileEntry(path=path, size=0, crc32=0)


def test_a_link_cannot_lead_outside_either(tmp_path: Path) -> None:
    store = store_in(tmp_path / "checkpoints")
    committed = save(store, 10)
    (committed / "engine").rename(tmp_path / "engine")
    (committed / "engine").symlink_to(tmp_path / "engine")
    with pytest.raises(CheckpointError, match="engine is a link"):
        store.verify(committed)


def test_a_link_is_not_committed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    aside = store.begin(10)
    (aside / "engine" / "weights").symlink_to(__file__)
    with pytest.raises(CheckpointError, match="is a link"):
        files.names(aside)


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=2, keep_every=20)
    for step in range(5, 46, 5):
        save(store, step)
    assert names(tmp_path) == [f"step_{step:010d}" for step in (20, 40, 45)]


def test_pruning_never_takes_the_newest_good_one(tmp_path: Path) -> None:
    keeper = store_in(tmp_path, keep_last=4)
    for step in (10, 20, 30, 40):
        save(keeper, step)
    for step in (30, 40):  # same size, other bytes: only a full read can tell
        (tmp_path / f"step_{step:010d}" / "engine" / "rank_0.bin").write_bytes(b"\xff" * 1000)
    fresh = store_in(tmp_path, keep_last=1)
    fresh.prune()
    assert names(tmp_path) == [f"step_{step:010d}" for step in (20, 30, 40)]
    found = Tiers(shared=fresh).latest_good(lambda _: None)
    assert found is not None
    assert found[1].step == 20


def test_pruning_removes_nothing_when_nothing_is_good(tmp_path: Path) -> None:
    keeper = store_in(tmp_path, keep_last=3)
    for path in [save(keeper, step) for step in (10, 20, 30)]:
        (path / "manifest.json").unlink()
    store_in(tmp_path, keep_last=1).prune()
    assert len(names(tmp_path)) == 3


def test_a_damaged_one_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    keeper = store_in(tmp_path, keep_last=3)
    for step in (10, 20):
        save(keeper, step)
    (tmp_path / "step_0000000020" / "manifest.json").unlink()
    save(store_in(tmp_path, keep_last=2), 30)
    assert names(tmp_path) == ["step_0000000010", "step_0000000030"]


def test_old_leftovers_go_and_foreign_files_stay(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.begin(5)
    (tmp_path / "step_0000000004.removed.tmp").mkdir()
    (tmp_path / "notes.tmp").write_text("mine")
    store.begin(30)
    save(store, 10)
    assert names(tmp_path) == ["notes.tmp", "step_0000000010", "step_0000000030.tmp"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    (save(store, 20) / "manifest.json").unlink()
    save(store, 20)
    assert names(tmp_path) == ["step_0000000010", "step_0000000020"]
    assert store_in(tmp_path).verify(tmp_path / "step_0000000020").step == 20


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_is_one_sentence_and_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = store_in(tmp_path)
    save(store, 10)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os if call == "fsync" else Path, call, fail)
        with pytest.raises(
            CheckpointError, match=r"could not write checkpoint step 20 .*No space left"
        ) as caught:
            save(store, 20)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step_0000000010"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="could not write checkpoint step 1"):
        store_in(tmp_path / "checkpoints").begin(1)


def test_a_removal_that_fails_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path, keep_last=1)
    save(store, 10)

    def fail(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied")

    aside = store.begin(20)
    (aside / "engine" / "x").write_bytes(b"x")
    monkeypatch.setattr(shutil, "rmtree", fail)
    assert commit(store, 20).name == "step_0000000020"
    assert "could not remove old checkpoint" in caplog.text
