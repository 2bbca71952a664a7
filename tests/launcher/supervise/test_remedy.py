from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from launcher import errors
from launcher.run_dir import RunDir
from launcher.supervise import remedy
from launcher.supervise.failure import Failure
from launcher.supervise.policy import Cause

Frozen = Callable[..., RunDir]


def fix(run: RunDir, cause: Cause, **more: Any) -> str | None:
    failure = Failure(cause=cause, error=errors.TrainingError("x"))
    change = remedy.after_failure(run, failure, **{"step": 0, "failed_before": 0, **more})
    return None if change is None else change.step


@pytest.mark.parametrize("cause", ["out_of_memory", "bad_loss", "lost_rank"])
def test_nothing_changes_unless_it_was_allowed(frozen: Frozen, cause: Cause) -> None:
    run = frozen("plan.micro_batch_size=4")
    before = run.plan_file.read_text(), run.config_file.read_text()
    assert fix(run, cause) is None
    assert (run.plan_file.read_text(), run.config_file.read_text()) == before


def test_a_smaller_plan_is_frozen_and_what_a_person_left_open_stays_open(frozen: Frozen) -> None:
    run = frozen("plan.micro_batch_size=4", "supervise.on_out_of_memory=[halve_micro_batch]")
    before = run.plan()
    assert fix(run, "out_of_memory") == "halve_micro_batch"
    after, request = run.plan(), run.job().plan
    assert (after.micro_batch_size, after.num_microbatches) == (2, before.num_microbatches * 2)
    assert (request.micro_batch_size, request.recompute) == (2, None)
    assert (after.zero_stage, after.recompute) == (before.zero_stage, before.recompute)
    assert json.loads((run.old_plans / "plan_0001.json").read_text())["micro_batch_size"] == 4


def test_a_plan_that_the_planner_refuses_is_left_out(frozen: Frozen) -> None:
    run = frozen(
        "plan.micro_batch_size=1",
        "plan.recompute=full",
        "supervise.on_out_of_memory=[halve_micro_batch,more_recompute]",
    )
    assert fix(run, "out_of_memory") is None


def test_replan_takes_a_plan_that_needs_clearly_less(frozen: Frozen) -> None:
    run = frozen("supervise.on_out_of_memory=[replan]", "training.sequence_length=512", "plan.zero_stage=0")
    before = sum(run.plan_data()["predictions"]["memory_bytes_by_part"].values())
    steps = 0
    while fix(run, "out_of_memory") == "replan":
        after = sum(run.plan_data()["predictions"]["memory_bytes_by_part"].values())
        assert after <= 0.8 * before
        before, steps = after, steps + 1
    assert steps > 0
    assert run.plan().global_batch_size == 8


def test_the_batch_after_the_last_good_step_is_left_out(frozen: Frozen) -> None:
    run = frozen("supervise.on_bad_loss=[skip_batch]")
    lines = [json.dumps({"step": step, "consumed_samples": 8 * step}) for step in (1, 2, 3)]
    run.metrics_file.write_text("\n".join(lines) + "\n")
    plan = run.plan()
    assert fix(run, "bad_loss", step=2) == "skip_batch"
    assert run.job().data.skip_samples == (16,)
    assert fix(run, "bad_loss", step=2) == "skip_batch"  # the one that took its place is bad as well
    assert run.job().data.skip_samples == (16, 24)
    assert run.plan() == plan
    (first, _) = (event for event in run.events() if event["event"] == "remedied")
    assert (first["reason"], first["words"]) == ("bad_loss", ["data.skip_samples=[16]"])


def test_a_plan_by_hand_is_a_new_wish(frozen: Frozen) -> None:
    run = frozen("strategy=accelerate", "cluster.gpus_per_node=4")
    assert remedy.whole(run).devices == 4
    assert remedy.for_devices(run, 2)
    assert (remedy.whole(run).devices, run.plan().world_size) == (4, 2)
    run.log_event("replanned", words=["plan.zero_stage=0"])
    assert remedy.whole(run).devices == 2


def test_all_a_plan_is_made_of_may_change_before_ranks_are_given_up(frozen: Frozen) -> None:
    run = frozen("strategy=megatron", "cluster.gpus_per_node=4", "plan.tp=2", "plan.pp=2")
    assert remedy.for_devices(run, 2)  # neither tp nor pp can stay: the checkpoint may be cut anew
    assert run.plan().world_size == 2
    assert run.plan().tp * run.plan().pp <= 2
    assert remedy.for_devices(run, 4)
    assert (run.plan().tp, run.plan().pp) == (2, 2)
