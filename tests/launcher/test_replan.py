"""Resuming under another plan: what may change, what may not, and that a refusal changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import LAYOUT
from launcher.errors import ClusterError
from launcher.planner.problem import PlanRequest
from launcher.planner.search.goals import Goal
from launcher.replan import with_words
from launcher.run_dir import open_run, since_replanned

Call = Callable[..., Any]
SMALL = (
    *(
        "strategy=fake",
        "monitor=none",
        "cluster.gpus_per_node=2",
        "data.max_bytes=300000",
        "model.num_layers=2",
    ),
    *("training.sequence_length=64", "training.global_batch_size=8", "training.num_steps=4"),
    *("evaluation.num_sequences=8", "plan.tp=1", "plan.pp=1"),
)


@pytest.fixture
def stopped(call: Call, tmp_path: Path) -> Path:
    """A run of one rank of the fake engine, stopped half-way."""
    run = tmp_path / "run"
    words = [word for word in SMALL if word != "cluster.gpus_per_node=2"]
    outcome = call("train", *words, "cluster.gpus_per_node=1", f"run_dir={run}", "stop_at_step=2")
    assert outcome.code == 0, outcome.err
    return run


def test_keys_that_leave_the_checkpoint_as_it_is_may_change(call: Call, stopped: Path) -> None:
    before = json.loads((stopped / "plan.json").read_text())
    outcome = call("resume", str(stopped), "plan.micro_batch_size=2", "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["state"], outcome.json["step"]) == ("finished", 4)
    after = json.loads((stopped / "plan.json").read_text())
    assert before["micro_batch_size"] != 2
    assert after["micro_batch_size"] == 2
    assert json.loads((stopped / "plans" / "plan_0001.json").read_text()) == before
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    replanned = next(event for event in events if event["event"] == "replanned")
    assert replanned["words"] == ["plan.micro_batch_size=2"]
    assert replanned["after"]["micro_batch_size"] == 2


def test_what_the_supervisor_may_do_can_be_said_later(call: Call, stopped: Path) -> None:
    before = (stopped / "plan.json").read_bytes()
    words = ("supervise.on_out_of_memory=[halve_micro_batch]", "supervise.max_restarts=7")
    outcome = call("resume", str(stopped), *words, "--json")
    assert (outcome.code, outcome.json["state"]) == (0, "finished"), outcome.err
    policy = open_run(stopped).job().supervise
    assert (policy.on_out_of_memory, policy.max_restarts) == (("halve_micro_batch",), 7)
    assert (stopped / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("plan.zero_stage=1",), 6, "plan.zero_stage: 0 in the checkpoint, 1 now"),
        (("plan.tp=3",), 3, "plan.tp=3"),
        (("plan.zero_stag=1",), 2, "unknown key 'plan.zero_stag'; did you mean 'zero_stage'?"),
        (("model.num_layers=3",), 2, "'model.num_layers=3' cannot be changed when a run is resumed"),
        (
            ("training.seed=3",),
            2,
            "only plan.KEY=VALUE, supervise.KEY=VALUE, cluster.num_nodes=N and ",
        ),
        (("plan",), 2, "'plan' cannot be changed"),
        (("plan.tp=[",), 2, "'plan.tp=[' has a value that cannot be read"),
        (("--fast",), 2, "'--fast' is not a flag of `meshwright resume RUN_DIR`"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    call: Call, stopped: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    before = (stopped / "plan.json").read_bytes(), (stopped / "config.yaml").read_bytes()
    outcome = call("resume", str(stopped), *words)
    assert outcome.code == code, outcome.err
    assert sentence in outcome.err
    assert ((stopped / "plan.json").read_bytes(), (stopped / "config.yaml").read_bytes()) == before
    assert not (stopped / "plans").exists()


def test_a_finished_run_keeps_its_plan(call: Call, stopped: Path) -> None:
    assert call("resume", str(stopped)).code == 0
    before = (stopped / "plan.json").read_bytes()
    outcome = call("resume", str(stopped), "plan.micro_batch_size=2")
    assert (outcome.code, "is finished, there is nothing to plan anew" in outcome.err) == (2, True)
    assert (stopped / "plan.json").read_bytes() == before


def test_hardware_that_is_not_here_changes_nothing(
    call: Call, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ClusterError("4 GPUs are planned and this host shows 0")

    monkeypatch.setattr("launcher.submit.local.check_gpus", refuse)
    before = (stopped / "plan.json").read_bytes()
    assert call("resume", str(stopped), "plan.micro_batch_size=2").code == 8
    assert (stopped / "plan.json").read_bytes() == before


def test_what_checkpoints_depend_on_is_not_planned_again(stopped: Path) -> None:
    run = open_run(stopped)
    plan, job = run.plan(), run.job()
    free = replace(job, plan=PlanRequest())
    request = with_words(free, ["plan.micro_batch_size=2"], plan=plan).plan
    assert request.micro_batch_size == 2
    assert request.num_microbatches is None
    assert {name: getattr(request, name) for name in LAYOUT} == {name: getattr(plan, name) for name in LAYOUT}
    # Megatron-core's can be read under other degrees, not under another ZeRO stage.
    megatron = with_words(
        free, [], plan=replace(plan, strategy="megatron", rank_order=("tp", "cp", "dp", "pp"))
    )
    assert (megatron.plan.tp, megatron.plan.zero_stage) == (None, plan.zero_stage)
    assert (megatron.strategy.name, megatron.goal) == ("megatron", Goal())


def test_figures_of_a_replaced_plan_are_left_behind() -> None:
    events = [
        {"event": "finished", "measured": {"step_s": 1.0}},
        {"event": "replanned"},
        {"event": "resumed"},
    ]
    assert since_replanned(events) == [{"event": "resumed"}]
    assert since_replanned(events[:1]) == events[:1]
