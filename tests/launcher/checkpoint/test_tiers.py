from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoint import CheckpointPolicy, CheckpointStore, Manifest, Tiers, files, open_tiers
from launcher.errors import CheckpointError


def save(store: CheckpointStore, content: Manifest, step: int) -> Path:
    aside = store.begin(step)
    (aside / "engine" / "rank_0").write_bytes(bytes([step]) * 100)
    listed = tuple(files.entries(aside, files.names(aside)))
    return store.commit(replace(content, step=step, files=listed))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "env.json").write_text('{"created": "today"}')
    return tmp_path / "run"


def tiers_of(run: Path, fast_dir: Path) -> Tiers:
    policy = CheckpointPolicy(fast_dir=str(fast_dir), keep_last_fast=1)
    return open_tiers(policy, checkpoints=run / "checkpoints", identity=run / "env.json")


def test_the_newest_good_one_of_both_is_found(tmp_path: Path, run: Path, content: Manifest) -> None:
    tiers = tiers_of(run, tmp_path / "fast")
    assert tiers.fast is not None and tiers.first is tiers.fast
    older, newer = save(tiers.shared, content, 10), save(tiers.fast, content, 20)
    same = save(tiers.shared, content, 20)
    assert tiers.committed() == [newer, same, older]
    (newer / "engine" / "rank_0").write_bytes(b"\xff" * 100)
    heard: list[str] = []
    again = tiers_of(run, tmp_path / "fast")
    found = again.latest_good(heard.append)
    assert found is not None and found[0] == same
    assert len(heard) == 1 and "has checksum" in heard[0]


def test_each_tier_keeps_its_own_number(tmp_path: Path, run: Path, content: Manifest) -> None:
    tiers = tiers_of(run, tmp_path / "fast")
    assert tiers.fast is not None
    for step in (10, 20, 30):
        save(tiers.fast, content, step)
        save(tiers.shared, content, step)
    assert [path.name[-2:] for path in tiers.fast.committed()] == ["30"]
    assert [path.name[-2:] for path in tiers.shared.committed()] == ["30", "20"]


def test_another_run_is_not_found_on_the_fast_tier(tmp_path: Path, run: Path, content: Manifest) -> None:
    first = tiers_of(run, tmp_path / "fast").fast
    assert first is not None
    save(first, content, 10)
    # A copy of the run, and a new run in the old place.
    shutil.copytree(run, tmp_path / "copy")
    assert tiers_of(tmp_path / "copy", tmp_path / "fast").committed() == []
    (run / "env.json").write_text('{"created": "tomorrow"}')
    assert tiers_of(run, tmp_path / "fast").committed() == []


def test_what_does_not_belong_is_skipped_on_the_fast_tier_only(
    tmp_path: Path, run: Path, content: Manifest
) -> None:
    def refuse(manifest: Manifest) -> None:
        raise CheckpointError("of another run")

    tiers = tiers_of(run, tmp_path / "fast")
    assert tiers.fast is not None
    save(tiers.fast, content, 20)
    shared = save(tiers.shared, content, 10)
    heard: list[str] = []
    found = tiers.latest_good(heard.append, belongs=refuse)
    assert found is not None and found[0] == shared
    assert len(heard) == 1 and "of another run" in heard[0]


def test_without_a_fast_tier_there_is_one_store(run: Path) -> None:
    tiers = open_tiers(CheckpointPolicy(), checkpoints=run / "checkpoints", identity=run / "env.json")
    assert tiers.fast is None and tiers.first is tiers.shared
