"""One rank as a process of its own, and what it leaves behind when it dies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.manifest import sealed

TINY = (
    *("monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=2"),
)


@pytest.fixture
def stopped(call: Callable[..., Any], tmp_path: Path) -> Path:
    run = tmp_path / "run"
    outcome = call("train", "strategy=fake", *TINY, f"run_dir={run}", "stop_at_step=1", "--json")
    assert outcome.code == 0, outcome.err
    return run


def test_an_unforeseen_fault_names_rank_frame_and_traceback(call: Callable[..., Any], stopped: Path) -> None:
    state = next((stopped / "checkpoints").glob("step_*/engine/rank-00000.json"))
    # The checkpoint stays whole by its manifest; only its meaning is damaged.
    content = json.loads(state.read_text())
    damaged = json.dumps({"steps": content["steps"], "checksun": content["checksum"]})
    state.write_text(damaged.ljust(state.stat().st_size))
    _sign(state)
    outcome = call("resume", str(stopped), "--json")
    assert outcome.code == 9
    message = outcome.json["error"]["message"]
    assert "rank 0 on" in message
    assert "KeyError: 'checksum'" in message
    assert "fake.py:" in message
    trace = next((stopped / "errors").glob("rank_00000.txt"))
    assert str(trace) in message
    assert "Traceback" in trace.read_text()
    assert call("show", str(stopped), "--json").json["state"] == "failed"


def _sign(state: Path) -> None:
    """Give the manifest the checksum of what `state` holds now."""
    import zlib

    manifest = state.parents[1] / "manifest.json"
    data = json.loads(manifest.read_text())
    for entry in data["files"]:
        if entry["path"] == f"engine/{state.name}":
            entry["crc32"] = zlib.crc32(state.read_bytes())
            entry["size"] = state.stat().st_size
    manifest.write_bytes(sealed({**data, "crc32": ""}))


def test_token_files_that_went_away_are_one_sentence(call: Callable[..., Any], stopped: Path) -> None:
    frozen = json.loads((stopped / "data.json").read_text())
    train = Path(frozen["directory"]) / "train.bin"
    content = train.read_bytes()
    train.unlink()
    try:
        outcome = call("resume", str(stopped), "--json")
    finally:
        train.write_bytes(content)
    assert outcome.code == 4
    assert "train.bin" in outcome.json["error"]["message"]
