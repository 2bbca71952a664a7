"""One rank that measures: everything is there and above zero, time runs out cleanly, groups cross one tier only."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from launcher.ranks import Ranks
from launcher.verbs import probe_worker
from launcher.verbs.probe_worker import FAULT, Bench, Sizes, groups, main, measure

TINY = Sizes(products=((8, 8, 8), (16, 8, 8)), sequences=(8, 16), copied_bytes=2**12, messages=(2**10, 2**12))


def bench(*, seconds: float = 60.0) -> Bench:
    alone = Ranks(rank=0, world_size=1, local_rank=0)
    return Bench(ranks=alone, device=torch.device("cpu"), sizes=TINY, deadline=time.monotonic() + seconds)


@pytest.fixture(autouse=True)
def _short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_worker, "_BATCH_S", 1e-4)


def test_one_rank_measures_all_but_communication() -> None:
    found = measure(bench(), tiers=[1])
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert [(row["precision"], row["m"]) for row in found["products"]] == [
        ("fp32", 8),
        ("fp32", 16),
        ("bf16", 8),
        ("bf16", 16),
    ]
    assert [row["name"] for row in found["memory"]] == ["copy", "elementwise"]
    assert [row["length"] for row in found["attention"]] == [8, 16]
    assert all(row["s"] > 0 for row in (*found["products"], *found["memory"]))
    assert all(row["forward_s"] > 0 and row["backward_s"] > 0 for row in found["attention"])
    assert found["host"]["whole_s"] > 0 and "sharded_s" not in found["host"]
    assert found["collectives"] == [] and "overlap" not in found


def test_work_that_takes_longer_is_measured_as_longer() -> None:
    def sleep(seconds: float) -> float:
        found = bench().seconds(lambda: time.sleep(seconds))
        assert found is not None
        return found

    assert 0.004 < sleep(0.004) < sleep(0.02)


def test_when_the_time_is_up_nothing_more_is_measured() -> None:
    found = measure(bench(seconds=-1.0), tiers=[1])
    assert not any(found[key] for key in ("products", "memory", "attention", "collectives"))


def test_groups_cross_one_tier_and_hold_every_rank_once() -> None:
    assert groups(4, inner=1, outer=4) == [[0, 1, 2, 3]]
    assert groups(4, inner=1, outer=2) == [[0, 1], [2, 3]]
    assert groups(4, inner=2, outer=4) == [[0, 2], [1, 3]]
    for world, inner, outer in ((8, 2, 8), (16, 4, 16), (6, 2, 6), (8, 1, 2), (8, 8, 8)):
        members = [rank for group in groups(world, inner=inner, outer=outer) for rank in group]
        assert sorted(members) == list(range(world))


def test_a_fault_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = tmp_path / "request.json"
    content = {"device": "cpu", "seconds": 60, "tiers": [1], "results": str(tmp_path / "no" / "results.json")}
    request.write_text(json.dumps({**content, "seconds": -1}), encoding="utf-8")
    assert main([str(request)]) == 1
    assert capsys.readouterr().err.startswith(f"{FAULT}FileNotFoundError: ")
