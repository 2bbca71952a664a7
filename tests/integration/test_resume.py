"""Stop half-way and resume: the losses left are the uninterrupted run's to the last bit. Real engines and ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    *("monitor=none", "cluster.gpus_per_node=2", "data.max_bytes=300000", "model.num_layers=2"),
    *("training.sequence_length=64", "training.global_batch_size=8", "training.num_steps=8"),
    *("plan.num_microbatches=2", "evaluation.num_sequences=8"),
)
# Every engine and stage this version runs; a later strategy joins by one line.
PLANS = {
    "accelerate-ddp": ("strategy=accelerate", "plan.zero_stage=0"),
    "accelerate-fsdp2-keep": ("strategy=accelerate", "plan.zero_stage=2"),
    "accelerate-fsdp2": ("strategy=accelerate", "plan.zero_stage=3"),
    "accelerate-ddp-bf16": ("strategy=accelerate", "plan.zero_stage=0", "training.precision=bf16"),
    "deepspeed-0": ("strategy=deepspeed", "plan.zero_stage=0"),
    "deepspeed-1": ("strategy=deepspeed", "plan.zero_stage=1"),
    "deepspeed-2": ("strategy=deepspeed", "plan.zero_stage=2"),
    "deepspeed-3": ("strategy=deepspeed", "plan.zero_stage=3"),
    "deepspeed-2-offload": ("strategy=deepspeed", "plan.zero_stage=2", "plan.offload_optimizer=true"),
    "deepspeed-3-bf16": ("strategy=deepspeed", "plan.zero_stage=3", "training.precision=bf16"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_resume_is_exact(shell: Callable[..., Any], tmp_path: Path, plan: str) -> None:
    """The check trains on, then goes back to the checkpoint at half way and compares every later loss."""
    words = (
        *SMALL,
        *PLANS[plan],
        "data.num_workers=2",
        "checkpoint.interval=4",
        "checks.resume_is_exact=true",
    )
    outcome = shell("train", *words, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "resume repeated 4 losses exactly" in outcome.out


def test_stop_and_resume_equals_one_run(shell: Callable[..., Any], tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert shell("train", *SMALL, f"run_dir={whole}").code == 0
    assert shell("train", *SMALL, f"run_dir={halved}", "stop_at_step=4").code == 0
    assert [step for step, _ in losses(halved)] == [1, 2, 3, 4]
    assert shell("resume", str(halved)).code == 0
    assert losses(halved) == losses(whole)
    assert len(losses(whole)) == 8


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]
