"""A run stopped under one plan and resumed under another: the losses go on as if nothing had changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    *("monitor=none", "cluster.gpus_per_node=2", "data.max_bytes=300000", "model.num_layers=2"),
    *("training.sequence_length=64", "training.global_batch_size=8", "training.num_steps=8"),
    *("training.precision=fp32", "plan.num_microbatches=2", "evaluation.num_sequences=8"),
)
# The plan that starts, the words that go on.
CHANGES = {
    "accelerate-fsdp2-to-one-process": (
        ("strategy=accelerate", "plan.zero_stage=3"),
        ("cluster.gpus_per_node=1", "plan.zero_stage=0"),
    ),
    "deepspeed-zero3-to-tp2": (
        ("strategy=deepspeed", "plan.zero_stage=3"),
        ("plan.zero_stage=1", "plan.tp=2"),
    ),
    # The degrees that the words leave change as well; what the files depend on does not.
    "megatron-tp2-to-dp2": (("strategy=megatron", "plan.tp=2"), ("plan.tp=1",)),
    "megatron-tp2-to-pp2": (("strategy=megatron", "plan.tp=2"), ("plan.tp=1", "plan.pp=2")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_losses_go_on(shell: Callable[..., Any], tmp_path: Path, change: str) -> None:
    start, words = CHANGES[change]
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert shell("train", *SMALL, *start, f"run_dir={whole}").code == 0
    assert shell("train", *SMALL, *start, f"run_dir={changed}", "stop_at_step=4").code == 0
    outcome = shell("resume", str(changed), *words)
    assert outcome.code == 0, outcome.err
    assert losses(changed) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(whole)) == 8
    # The losses may well be the same to the last bit; the plan that wrote the last checkpoint is not.
    assert newest_manifest(changed)["plan"] != newest_manifest(whole)["plan"]
    assert set(newest_manifest(changed)["reshardable"]) >= {"dp"}


def newest_manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max(run.glob("checkpoints/*/manifest.json")).read_text())
    return found


def losses(run: Path) -> list[float]:
    lines = (run / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
