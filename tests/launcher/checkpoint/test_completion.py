"""The second half of a save on ranks that are threads: real files, real meetings, no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import CheckpointStore, Manifest, Tiers
from launcher.checkpoint.completion import Completion, assigned, failure
from launcher.errors import CheckpointError


def save(ranks: Any, tiers: Tiers, content: Manifest, *, fail_on: int | None = None) -> None:
    directory = tiers.first.join(content.step)

    def write() -> None:
        if ranks.rank == fail_on:
            raise OSError(28, "No space left on device")
        (directory / "engine" / f"rank_{ranks.rank}").write_bytes(bytes([ranks.rank]) * 1000)

    Completion(peers=ranks, tiers=tiers, content=content)(write)


def test_all_ranks_together_make_a_checkpoint(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]]
) -> None:
    tiers = Tiers(shared=CheckpointStore(tmp_path, keep_last=2))
    assert on_ranks(lambda ranks: save(ranks, tiers, content), world_size=3) == [None] * 3
    found = tiers.verify(tmp_path / "step_0000000020")
    assert [entry.path for entry in found.files] == ["engine/rank_0", "engine/rank_1", "engine/rank_2"]


def test_one_rank_that_fails_fails_all_and_leaves_nothing(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]]
) -> None:
    tiers = Tiers(shared=CheckpointStore(tmp_path, keep_last=2))
    errors = on_ranks(lambda ranks: save(ranks, tiers, content, fail_on=1), world_size=3)
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], CheckpointError)
    assert "checkpoint of step 20 could not be written" in str(errors[0])
    assert "No space left" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def test_a_fast_tier_is_first_and_the_shared_one_gets_the_same_bytes(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]]
) -> None:
    tiers = Tiers(
        shared=CheckpointStore(tmp_path / "shared", keep_last=2),
        fast=CheckpointStore(tmp_path / "fast", keep_last=1),
    )
    assert on_ranks(lambda ranks: save(ranks, tiers, content), world_size=2) == [None] * 2
    shared, fast = (tmp_path / tier / "step_0000000020" for tier in ("shared", "fast"))
    assert tiers.committed() == [fast, shared]
    assert tiers.verify(shared) == tiers.verify(fast)


def test_disks_of_nodes_hold_no_whole_checkpoint_but_the_shared_tier_does(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]]
) -> None:
    def on_own_node(ranks: Any) -> None:
        tiers = Tiers(
            shared=CheckpointStore(tmp_path / "shared", keep_last=2),
            fast=CheckpointStore(tmp_path / f"node_{ranks.rank}", keep_last=1),
        )
        save(ranks, tiers, content)

    assert on_ranks(on_own_node, world_size=2) == [None] * 2
    shared = CheckpointStore(tmp_path / "shared", keep_last=2)
    found = shared.verify(tmp_path / "shared" / "step_0000000020")
    assert [entry.path for entry in found.files] == ["engine/rank_0", "engine/rank_1"]
    assert [list((tmp_path / f"node_{rank}").iterdir()) for rank in (0, 1)] == [[], []]


def test_a_shared_disk_that_is_full_leaves_the_fast_one_good(
    tmp_path: Path, content: Manifest, on_ranks: Callable[..., list[Any]]
) -> None:
    (tmp_path / "shared").write_text("a file where a folder should be")
    tiers = Tiers(
        shared=CheckpointStore(tmp_path / "shared", keep_last=2),
        fast=CheckpointStore(tmp_path / "fast", keep_last=1),
    )
    errors = on_ranks(lambda ranks: save(ranks, tiers, content), world_size=2)
    assert all("could not write checkpoint step 20" in str(error) for error in errors)
    found = tiers.latest_good(pytest.fail)
    assert found is not None and found[0] == tmp_path / "fast" / "step_0000000020"


def test_files_are_dealt_out_to_those_who_see_them() -> None:
    seen = [["a", "b", "c", "d"], ["a", "b", "c", "d", "e"]]
    mine = [assigned(seen, rank=rank) for rank in (0, 1)]
    assert sorted(mine[0] + mine[1]) == ["a", "b", "c", "d", "e"]
    assert "e" in mine[1]
    assert mine[0] and not set(mine[0]) & set(mine[1])


def test_the_reason_is_what_tracebacks_of_other_ranks_end_with(tmp_path: Path) -> None:
    tiers = Tiers(shared=CheckpointStore(tmp_path, keep_last=2))
    text = "CheckpointException ranks:dict_keys([0])\nTraceback (most recent call last):\n  x\n"
    text += "OSError: [Errno 27] File too large\n"
    assert ": RuntimeError: first;" in str(failure(3, tiers, RuntimeError("first\nsecond")))
    assert ": KeyError: 'weight';" in str(failure(3, tiers, KeyError("weight")))
    assert ": [Errno 5] Input/output error;" in str(failure(3, tiers, OSError(5, "Input/output error")))
    assert "OSError: [Errno 27] File too large;" in str(failure(3, tiers, RuntimeError(text)))
    short = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    assert f"No space left on device, or no room under a limit on file sizes (torch: {short});" in str(
        failure(3, tiers, RuntimeError(short))
    )
    assert ": KeyError;" in str(failure(3, tiers, KeyError()))
