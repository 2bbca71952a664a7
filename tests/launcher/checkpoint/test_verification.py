"""Reading together, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import CheckpointStore, Manifest, Tiers, files
from launcher.checkpoint.verification import attempt, latest_good
from launcher.errors import CheckpointError


def save(store: CheckpointStore, content: Manifest, step: int) -> Path:
    aside = store.begin(step)
    for number in range(5):
        (aside / "engine" / f"rank_{number}").write_bytes(bytes([step, number]) * 100)
    listed = tuple(files.entries(aside, files.names(aside)))
    return store.commit(replace(content, step=step, files=listed))


@pytest.mark.parametrize("number", range(5))
def test_whoever_reads_the_damage_all_fall_back(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]], number: int
) -> None:
    store = CheckpointStore(tmp_path, keep_last=5)
    older, newer = save(store, content, 10), save(store, content, 20)
    (newer / "engine" / f"rank_{number}").write_bytes(b"\xff" * 200)
    heard: list[str] = []

    def look(ranks: Any) -> Any:
        tiers = Tiers(shared=CheckpointStore(tmp_path, keep_last=5))
        found = latest_good(ranks, tiers, heard.append, belongs=lambda manifest: None)
        tiers.shared.prune()
        return found

    found = on_ranks(look, world_size=3)
    assert [(path, manifest.step) for path, manifest in found] == [(older, 10)] * 3
    assert len(heard) == 1, "rank 0 says it"
    assert f"rank_{number} has checksum" in heard[0]


def test_a_damaged_manifest_is_found_by_one_and_believed_by_all(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]]
) -> None:
    store = CheckpointStore(tmp_path, keep_last=5)
    (save(store, content, 10) / "manifest.json").write_text("{}")

    def look(ranks: Any) -> Any:
        return latest_good(ranks, Tiers(shared=store), lambda sentence: None, belongs=lambda manifest: None)

    assert on_ranks(look, world_size=2) == [None, None]


def test_a_result_or_a_sentence() -> None:
    def fail() -> None:
        raise CheckpointError("no")

    assert attempt(lambda: 3) == (3, None)
    assert attempt(fail) == (None, "no")
