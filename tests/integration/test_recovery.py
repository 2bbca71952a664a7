"""Real workers killed, stopped and paused by a schedule: the launcher brings the run to its end, losses and all."""

from __future__ import annotations

import statistics

import pytest

from benchmarks import chaos
from benchmarks.chaos import Fault, Kind, Outcome
from launcher.monitor.metrics import read
from launcher.supervise.processes import stacks_file

STEP_TIMEOUT_S = 12.0
WORDS = (
    *(
        "strategy=accelerate",
        "plan.zero_stage=2",
        "monitor=none",
        "cluster.gpus_per_node=2",
        "data.max_bytes=300000",
    ),
    *(
        "model.num_layers=2",
        "training.sequence_length=64",
        "training.global_batch_size=8",
        "training.num_steps=30",
    ),
    *("training.precision=fp32", "training.deterministic=true", "evaluation.num_sequences=8"),
    *("checkpoint.interval=5", f"supervise.step_timeout_s={STEP_TIMEOUT_S}", "supervise.backoff_s=0"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that nobody disturbs."""
    outcome = chaos.train(WORDS, [], path=tmp_path_factory.mktemp("whole") / "run")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def disturbed(whole: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same run with a kill in a step, one in the restart after it, and ranks that stand still."""
    step_s = statistics.median(line["step_time_s"] for line in read(whole.run.metrics_file))
    kinds: tuple[Kind, ...] = ("pause", "kill", "kill_in_restart", "stop")
    faults = chaos.schedule(kinds, num_steps=30, restart_s=5, step_s=step_s, seed=11)
    return chaos.train(WORDS, faults, path=tmp_path_factory.mktemp("disturbed") / "run")


def test_the_run_ends_as_if_nothing_had_happened(whole: Outcome, disturbed: Outcome) -> None:
    assert disturbed.code == 0, disturbed.err
    assert [done.fault.kind for done in disturbed.done] == ["pause", "kill", "kill_in_restart", "stop"]
    assert chaos.trajectory(disturbed.run) == chaos.trajectory(whole.run)
    assert [step for step, _, _ in chaos.trajectory(disturbed.run)] == list(range(1, 31))


def test_each_failure_is_named_and_a_pause_is_none(disturbed: Outcome) -> None:
    failed = [event for event in disturbed.run.events() if event["event"] == "failed"]
    done = disturbed.done[1:]
    assert [event["cause"] for event in failed] == ["lost_rank", "lost_rank", "hang"]
    assert [event["rank"] for event in failed] == [each.rank for each in done]
    told = [line for line in disturbed.err.splitlines() if "starting again" in line]
    assert len(told) == 3
    assert "was killed by SIGKILL" in told[0]
    assert "its process is stopped (SIGSTOP or a debugger)" in told[2]


def test_the_stopped_rank_is_found_within_its_time_and_all_stacks_are_kept(disturbed: Outcome) -> None:
    hang = next(event for event in disturbed.run.events() if event.get("cause") == "hang")
    silent_s = float(hang["message"].partition("no sign of life for ")[2].split()[0])
    assert STEP_TIMEOUT_S <= silent_s <= 1.1 * STEP_TIMEOUT_S
    for rank in range(2):
        # Not the step itself: a rank may be stopped between two, and the other one wait for its word on stopping.
        assert "in _loop\n" in stacks_file(disturbed.run, rank).read_text()


def test_a_schedule_follows_from_its_seed() -> None:
    kinds: tuple[Kind, ...] = ("kill", "kill_in_save")
    drawn = [chaos.schedule(kinds, num_steps=30, restart_s=5, step_s=0.1, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(isinstance(fault, Fault) and 1 <= fault.at_step < 30 for fault in drawn[0])
