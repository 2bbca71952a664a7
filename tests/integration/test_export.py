"""`meshwright export`: the weights of a checkpoint, read back by transformers, predict what the run did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    *("monitor=none", "cluster.gpus_per_node=2", "data.max_bytes=300000", "model.num_layers=2"),
    *("training.sequence_length=64", "training.global_batch_size=8", "training.num_steps=4"),
    *("training.precision=fp32", "evaluation.num_sequences=8"),
)
PLANS = {
    "accelerate-fsdp2": ("strategy=accelerate", "plan.zero_stage=3"),
    "deepspeed-zero3": ("strategy=deepspeed", "plan.zero_stage=3"),
    "megatron-tp2": ("strategy=megatron", "plan.tp=2"),
    "megatron-pp2": ("strategy=megatron", "plan.pp=2"),
    # A vocabulary that is padded, and one that a stage saves apart.
    "colossalai-tp2": ("strategy=colossalai", "plan.tp=2", "model.vocab_size=300"),
    "colossalai-pp2": ("strategy=colossalai", "plan.pp=2"),
    "colossalai-zero1": ("strategy=colossalai", "plan.zero_stage=1"),
    "colossalai-fsdp": ("strategy=colossalai", "plan.zero_stage=3"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_exported_weights_have_the_loss_of_the_run(
    shell: Callable[..., Any], tmp_path: Path, colossalai_python: str, plan: str
) -> None:
    python = [f"submit.python={colossalai_python}"] if plan.startswith("colossalai") else []
    run, folder = tmp_path / "run", tmp_path / "weights"
    trained = shell("train", *SMALL, *PLANS[plan], *python, f"run_dir={run}", "--json")
    assert trained.code == 0, trained.err
    exported = shell("export", str(run), str(folder), "--json")
    assert exported.code == 0, exported.err
    assert exported.json == {"weights": str(folder)}
    # A run that starts from the folder and does not learn evaluates to the same.
    words = [f"model.weights={folder}", "training.num_steps=1", "training.learning_rate=1e-30"]
    small = [word for word in SMALL if not word.startswith(("model.", "training.num_steps"))]
    again = shell("train", *small, *words, f"run_dir={tmp_path / 'again'}", "--json")
    assert again.code == 0, again.err
    assert again.json["validation_loss"] == pytest.approx(trained.json["validation_loss"], rel=1e-5)
    shown = shell("show", str(run), "--json")
    assert shown.json["state"] == "finished"


def test_an_engine_that_does_not_export_says_so(shell: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert shell("train", *SMALL, "strategy=fake", f"run_dir={run}").code == 0
    outcome = shell("export", str(run), str(tmp_path / "weights"))
    assert outcome.code == 7
    assert "FakeStrategy does not export weights yet" in outcome.err


@pytest.mark.parametrize("words", [(), ("run",), ("run", "weights", "more"), ("run", "--fast")])
def test_words_that_cannot_be_meant(call: Callable[..., Any], words: tuple[str, ...]) -> None:
    outcome = call("export", *words)
    assert outcome.code == 2
    assert "`meshwright export RUN_DIR FOLDER` takes a run directory and a folder" in outcome.err
