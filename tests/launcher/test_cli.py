"""The verbs as a person meets them, with the strategy that needs no engine where training is not the point."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import __version__
from launcher.cli import VERBS, find

Call = Callable[..., Any]
TINY = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=6"),
)


def test_usage_names_every_verb_and_exit_code(call: Call) -> None:
    text = call().out
    assert text == call("--help").out
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert "11 a check failed" in text
    assert call("--version").out == f"meshwright {__version__}\n"


def test_every_verb_is_there_and_says_what_it_does() -> None:
    assert all(find(verb).__doc__ for verb in VERBS)


def test_plan_prints_a_table_and_as_json_nothing_else(call: Call) -> None:
    words = ("plan", "model=llama3_70b", "cluster=h100_sxm", "cluster.num_nodes=8")
    text = call(*words)
    assert text.code == 0
    assert "llama3_70b" in text.out
    plan = call(*words, "--json").json
    assert plan["strategy"] == "accelerate"
    assert plan["dp"] * plan["tp"] * plan["pp"] * plan["cp"] == 64
    assert plan["predictions"]["step_s"] > 0


def test_pinned_values_are_kept(call: Call) -> None:
    plan = call("plan", "strategy=deepspeed", "plan.zero_stage=1", "plan.micro_batch_size=2", "--json").json
    assert (plan["strategy"], plan["zero_stage"], plan["micro_batch_size"]) == ("deepspeed", 1, 2)


def test_hydra_flags_work_behind_a_verb(call: Call, tmp_path: Path) -> None:
    config = call("plan", "--cfg", "job", "training.seed=5")
    assert config.code == 0
    assert "seed: 5" in config.out
    assert "key=value" in call("plan", "--help").out
    (tmp_path / "model").mkdir()
    own = "name: mine\nmodel_type: llama\nnum_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\n"
    own += "ffn_hidden_size: 64\nvocab_size: 300\nmax_position_embeddings: 64\n"
    (tmp_path / "model" / "mine.yaml").write_text(own)
    assert (
        call("plan", "--config-dir", str(tmp_path), "model=mine", "--json").json["inputs"]["model"]["name"]
        == "mine"
    )


def test_multirun_prints_one_document_a_job(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("plan", "plan.micro_batch_size=1,2", "--json", "--multirun", "plan.zero_stage=0")
    assert outcome.code == 0
    plans = [json.loads(line) for line in outcome.out.splitlines()]
    assert [plan["micro_batch_size"] for plan in plans] == [1, 2]
    assert not any(tmp_path.iterdir()), "Hydra must leave nothing where we stand"


@pytest.mark.parametrize("verb", [("train",), ("submit", "submit=slurm")])
def test_what_one_of_several_jobs_cannot_be_is_told_before_the_first_begins(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("strategy=fake", "training.global_batch_size=8", "cluster.gpus_per_node=1", "--multirun")
    outcome = call(verb[0], *verb[1:], *words, "plan.micro_batch_size=2,3")
    assert outcome.code == 3 and "plan.micro_batch_size=3" in outcome.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("meshwright pl", "plan"),
        ("meshwright plan model=llama3_7", "model=llama3_70b"),
        ("meshwright train training.num_s", "training.num_steps="),
    ],
)
def test_tab_completion(shell: Call, line: str, expected: str) -> None:
    outcome = shell("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert outcome.code == 0, outcome.err
    assert expected in outcome.out.split()


def test_not_a_number_is_null_in_json(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", *TINY, f"run_dir={run}", "--json").code == 0
    metrics = run / "metrics" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    with metrics.open("a") as file:
        file.write(json.dumps({**last, "step": 7, "loss": "nan", "grad_norm": "inf"}) + "\n")
    shown = call("show", str(run), "--json")
    assert "NaN" not in shown.out
    assert shown.json["loss"] is None


def test_a_closed_pipe_is_no_error(repository: Path) -> None:
    command = f"{sys.executable} -m launcher plan | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_any_strategy_plans_over_all_engines(call: Call) -> None:
    words = ("plan", "strategy=any", "model=llama3_70b", "cluster=h100_sxm", "cluster.num_nodes=8", "--json")
    plan = call(*words).json
    assert plan["inputs"]["strategies"] == ["accelerate", "colossalai", "deepspeed", "megatron"]
    assert plan["strategy"] == "megatron"
    assert call(*words, "strategy=megatron").json["predictions"] == plan["predictions"]


def test_a_goal_plans_part_of_the_cluster_and_is_not_trained(call: Call, tmp_path: Path) -> None:
    words = ("model=llama3_8b", "cluster=h100_sxm", "cluster.num_nodes=8", "training.global_batch_size=512")
    goal = ("goal=fewest_gpus", "goal.max_step_s=120")
    plan = call("plan", *words, *goal, "--json").json
    assert plan["inputs"]["cluster"]["num_nodes"] < 8
    assert plan["predictions"]["step_s"] <= 120
    refused = call("train", *words, *goal, f"run_dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert "goal=fewest_gpus plans other hardware or sequences than the run would have" in refused.err
    assert not (tmp_path / "run").exists()
