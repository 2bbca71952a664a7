"""Combinations become points: the impossible dropped with the reason, the equal once, the rest planned."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import compose, freeze
from launcher.errors import ConfigError
from launcher.sweep import points
from launcher.sweep.points import Expansion, pin_words, trial

SMALL = (
    *("strategy=fake", "cluster.gpus_per_node=1", "data.max_bytes=200000", "training.sequence_length=32"),
    "training.global_batch_size=8",
)
H100 = ("model=llama3_8b", "cluster=h100_sxm", "submit=slurm")


def expand(*words: str) -> Expansion:
    found = points.expand([*SMALL, *words])
    assert found is not None
    return found


def test_impossible_points_are_dropped_with_the_reason_and_equal_ones_are_kept_once() -> None:
    found = expand("plan.micro_batch_size=1,2,3", "plan.num_microbatches=null,4", "--multirun")
    assert [point.shown for point in found.points] == [
        "micro_batch_size=1 num_microbatches=null",
        "micro_batch_size=2 num_microbatches=null",
    ]
    assert [point.decision.plan.micro_batch_size for point in found.points] == [1, 2]
    told = {dropped.shown: (dropped.exit_code, dropped.reason) for dropped in found.dropped}
    assert told["micro_batch_size=2 num_microbatches=4"] == (
        0,
        "is the same as micro_batch_size=2 num_microbatches=null",
    )
    code, reason = told["micro_batch_size=3 num_microbatches=null"]
    assert code == 3 and "does not divide training.global_batch_size=8" in reason
    assert len(found.dropped) == 4
    assert found.words == SMALL


def test_a_value_that_means_nothing_is_dropped_where_others_mean_something() -> None:
    found = expand("plan.recompute=full,ful")
    assert [point.words for point in found.points] == [("plan.recompute=full",)]
    assert [(d.exit_code, d.reason) for d in found.dropped] == [
        (2, "plan.recompute=ful is not accepted; did you mean 'full'?")
    ]


def test_nodes_differ_from_point_to_point_and_more_than_this_host_needs_slurm() -> None:
    here = expand("cluster.num_nodes=1,2")
    assert [point.shown for point in here.points] == ["cluster.num_nodes=1"]
    assert "queue the sweep with submit=slurm" in here.dropped[0].reason
    queued = expand("cluster.num_nodes=1,2", "submit=slurm")
    assert [point.decision.job.cluster.num_nodes for point in queued.points] == [1, 2]


def test_the_best_plans_of_the_planner() -> None:
    words = (*H100, "strategy=megatron", "top_k=3", "cluster.num_nodes=1,2")
    found = points.expand(words)
    assert found is not None
    assert [point.words for point in found.points] == [
        *[("cluster.num_nodes=1",)] * 3,
        *[("cluster.num_nodes=2",)] * 3,
    ]
    (job,) = compose.jobs([*H100, "strategy=megatron"])
    best = [candidate.plan for candidate in freeze.rank(job).candidates[:3]]
    assert [point.decision.plan for point in found.points[:3]] == best
    assert all("sweep." not in word for word in found.words)
    assert found.points[0].decision.job.sweep.top_k is None, "a run of a sweep is an ordinary run"


def test_pins_are_words_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "it's a disk"
    quoted = str(folder).replace("'", "\\'")
    words = ["cluster=l40s_pcie", "model=gpt2_124m", "strategy=deepspeed", "plan.offload_optimizer=true"]
    (job,) = compose.jobs([*words, "plan.zero_stage=3", f"plan.nvme_path='{quoted}'"])
    plan = freeze.rank(job).choose().plan
    assert plan.nvme_path == str(folder)
    (again,) = compose.jobs([*words[:2], *shlex.split(shlex.join(pin_words(plan)))])
    assert [candidate.plan for candidate in freeze.rank(again).candidates] == [plan]


def test_a_trial_is_steps_and_nothing_else() -> None:
    (job,) = compose.jobs([*SMALL, "training.warmup_steps=50", "checkpoint.interval=5"])
    short = trial(job, 10)
    assert (short.training.num_steps, short.training.warmup_steps) == (10, 9)
    assert (short.evaluation.num_sequences, short.checkpoint.interval) == (0, 0)
    assert not short.checkpoint.save_last
    found = expand("plan.micro_batch_size=1,2", "sweep.steps=10")
    assert {point.decision.job.training.num_steps for point in found.points} == {10}


def test_a_file_of_a_cluster_stays_the_word_that_was_typed(tmp_path: Path, call: Callable[..., Any]) -> None:
    file = tmp_path / "here.yaml"
    config = call("plan", "cluster=h100_sxm", "--cfg", "job").out
    section = config[config.index("cluster:\n") + len("cluster:\n") :]
    lines = [line[2:] for line in section.splitlines() if line.startswith("  ")]
    file.write_text(
        "\n".join(lines[: next(i for i, line in enumerate(section.splitlines()) if line[:1] != " ")])
    )
    found = points.expand([f"cluster={file}", "model=gpt2_124m", "submit=slurm", "plan.micro_batch_size=1,2"])
    assert found is not None
    assert f"cluster={file}" in found.words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "was given one point; list values, as in plan.micro_batch_size=1,2,4"),
        (("plan.tp=1,2", "submit=ssh"), "submit=ssh starts one run; a sweep trains here with submit=local"),
        (("plan.tp=1,2", "submit=local,slurm"), "submit=slurm and submit=local cannot be in one sweep"),
        (("plan.tp=1,2", "run_dir=a,b"), "run_dir=b and run_dir=a cannot be in one sweep; give one value"),
        (("sweep.steps=10,20",), "sweep.steps=20 and sweep.steps=10 cannot be in one sweep"),
        (("plan.tp=1,2", "sweep.max_parallel=2"), "sweep.max_parallel=2 is for jobs of submit=slurm"),
        (
            ("plan.tp=1,2", "sweep.steps=3"),
            "sweep.steps=3 leaves no step after monitor.warmup_steps=3; use 8",
        ),
        (("plan.tp=1,2", "training.num_steps=2"), "training.num_steps=2 leaves no step after"),
        (("plan.tp=1,2", "checks.loss_falls=true"), "checks is set and has no place in a sweep"),
        (("plan.tp=1,2", "report=a.html"), "report is set and has no place"),
        (
            ("plan.tp=1,2", "supervise.on_out_of_memory=[halve_micro_batch]"),
            "supervise.on_out_of_memory is set",
        ),
        (("top_k=0",), "sweep.top_k=0 must be at least 1"),
        (("plan.zero_stag=1,2",), "unknown key 'plan.zero_stag'; did you mean 'zero_stage'?"),
    ],
)
def test_what_makes_no_sweep_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        points.expand([*SMALL, *words])
    assert sentence in str(error.value)


def test_help_is_no_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert points.expand(["--help"]) is None
    assert "key=value" in capsys.readouterr().out
