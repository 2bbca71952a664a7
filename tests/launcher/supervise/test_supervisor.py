"""The loop of starts with stand-ins for workers; real ones die in tests/integration/test_recovery.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import errors
from launcher.run_dir import RunDir
from launcher.supervise import supervisor
from launcher.supervise.others import Lost
from launcher.supervise.start import Ending
from launcher.supervise.supervisor import run_workers

Frozen = Callable[..., RunDir]
Stand = Callable[[str], None]
STEP = "Heart(run.heartbeats, rank=0).beat('stepping', {})\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)\n"


def fail(exception: str) -> str:
    return f"write_error(run, rank=1, host='h', error={exception}, frame='f.py:1', trace='t')\nsys.exit(1)\n"


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def test_a_killed_worker_is_started_again(
    frozen: Frozen, worker: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    run = frozen()
    worker(f"{STEP.format('start')}if start < 3: {DIE}")
    assert run_workers(run, quiet_stdout=True) == 0
    assert [event["step"] for event in events(run, "failed")] == [1, 2]
    (first, second) = events(run, "restarting")
    assert (first["cause"], first["number"], first["delay_s"]) == ("lost_rank", 1, 0)
    assert (second["step"], second["checkpoint"]) == (2, None)
    assert "was killed by SIGKILL" in (err := capsys.readouterr().err)
    assert "starting again from the beginning (restart 2 of 100)" in err


def test_a_run_on_several_hosts_goes_on_by_submit(on_two_hosts: RunDir) -> None:
    told = str(supervisor._final(errors.LostRankError("gone"), on_two_hosts, "enough"))
    assert (
        f"`meshwright submit {on_two_hosts.path}` on each host goes on from the last good checkpoint" in told
    )


def test_a_cause_is_told_once_over_all_starts(frozen: Frozen, worker: Stand, webhook: Any) -> None:
    run = frozen()
    worker(f"{STEP.format('start')}if start < 3: {DIE}")
    assert run_workers(run, quiet_stdout=True) == 0
    worker(f"{STEP.format('start + 10')}" + fail("BadLossError('nan')"))
    with pytest.raises(errors.BadLossError):
        run_workers(run, quiet_stdout=True)
    assert [event["cause"] for event in events(run, "failed")] == ["lost_rank", "lost_rank", "bad_loss"]
    assert [record["cause"] for record in webhook.taken] == ["lost_rank", "bad_loss"]
    assert "was killed by SIGKILL" in webhook.taken[0]["text"]


def test_a_hang_is_told_once(frozen: Frozen, worker: Stand, webhook: Any) -> None:
    run = frozen("supervise.step_timeout_s=1", "supervise.max_restarts=1")
    worker(f"signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n{STEP.format('start')}while True: time.sleep(1)")
    with pytest.raises(errors.HungError):
        run_workers(run, quiet_stdout=True)
    assert [(event["cause"], event["step"]) for event in events(run, "failed")] == [("hang", 1), ("hang", 2)]
    (taken,) = webhook.taken
    assert (taken["cause"], taken["step"]) == ("hang", 1)
    assert "supervise.step_timeout_s=1" in taken["text"]


def test_an_alert_that_nobody_takes_hides_no_failure(
    frozen: Frozen, worker: Stand, webhook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = frozen()
    monkeypatch.setenv("MESHWRIGHT_WEBHOOK_URL", "secret")
    worker(STEP.format(1) + fail("BadLossError('nan')"))
    with pytest.raises(errors.BadLossError):
        run_workers(run, quiet_stdout=True)
    assert len(events(run, "failed")) == 1
    assert webhook.taken == []


def test_it_ends_where_three_starts_made_no_step(frozen: Frozen, worker: Stand) -> None:
    run = frozen()
    worker(f"{STEP.format(4)}{DIE}")
    with pytest.raises(errors.LostRankError, match="3 starts in a row made no new step") as caught:
        run_workers(run, quiet_stdout=True)
    assert f"`meshwright resume {run.path}`" in str(caught.value)
    assert len(events(run, "launched")) == 4  # the first of them came to step 4
    assert len(events(run, "failed")) == 4


def test_a_new_checkpoint_is_progress_as_well(frozen: Frozen, worker: Stand) -> None:
    run = frozen()
    worker(
        f"{STEP.format(4)}(run.checkpoints / f'step_{{start:010d}}').mkdir(parents=True)\nif start < 8: {DIE}"
    )
    assert run_workers(run, quiet_stdout=True) == 0
    assert events(run, "restarting")[-1]["checkpoint"] == "step_0000000007"


@pytest.mark.parametrize(
    ("exception", "kind"),
    [
        ("KeyError('typo')", errors.TrainingError),
        ("ConfigError('no such key')", errors.ConfigError),
        ("PlanError('does not fit')", errors.PlanError),
        ("CheckpointError('none is good')", errors.CheckpointError),
        ("DeviceMemoryError('out of memory')", errors.DeviceMemoryError),
        ("BadLossError('nan')", errors.BadLossError),
    ],
)
def test_a_fault_that_stays_is_not_tried_again(
    frozen: Frozen, worker: Stand, exception: str, kind: type[errors.LauncherError]
) -> None:
    run = frozen()
    worker(STEP.format(1) + fail(exception))
    with pytest.raises(kind):
        run_workers(run, quiet_stdout=True)
    (failed,) = events(run, "failed")
    assert (failed["rank"], failed["host"], failed["frame"]) == (1, "h", "f.py:1")
    assert failed["exit_code"] == kind.exit_code


def test_memory_that_runs_out_walks_down_the_ladder(frozen: Frozen, worker: Stand) -> None:
    run = frozen(
        "plan.micro_batch_size=4",
        "plan.recompute=none",
        "supervise.on_out_of_memory=[halve_micro_batch,more_recompute]",
    )
    out_of_memory = fail('DeviceMemoryError("out of memory")').replace("\n", "\n    ").rstrip()
    worker(f"if run.plan().recompute == 'none':\n    {out_of_memory}\n")
    assert run_workers(run, quiet_stdout=True) == 0
    plan = run.plan()
    assert (plan.micro_batch_size, plan.num_microbatches, plan.recompute) == (1, 4, "selective")
    assert plan.global_batch_size == run.job().training.global_batch_size
    remedies = [(event["reason"], event["remedy"]) for event in events(run, "replanned")]
    assert remedies == [("out_of_memory", step) for step in ("halve_micro_batch",) * 2 + ("more_recompute",)]
    assert events(run, "restarting")[0]["remedy"] == "halve_micro_batch"
    assert len(list(run.old_plans.iterdir())) == 3


def test_a_request_to_stop_is_followed_by_no_start(frozen: Frozen, worker: Stand) -> None:
    run = frozen()
    worker(f"run.stop_file.touch()\n{DIE}")
    with pytest.raises(errors.LostRankError):
        run_workers(run, quiet_stdout=True)
    assert not events(run, "restarting")


def test_a_signal_while_waiting_for_the_next_start_ends_the_wait(frozen: Frozen, worker: Stand) -> None:
    run = frozen("supervise.backoff_s=600", "supervise.backoff_max_s=600")  # after a start without a step
    signal_later = f"until grep -q restarting {run.events_file}; do sleep 0.1; done; kill -TERM {os.getpid()}"
    worker(f"import subprocess\nsubprocess.Popen(['sh', '-c', '{signal_later}'])\n{DIE}")
    assert run_workers(run, quiet_stdout=True) == 143
    assert [event["signal"] for event in events(run, "interrupted")] == ["SIGTERM"]
    assert len(events(run, "launched")) == 1


def test_a_stop_file_of_an_earlier_day_is_not_meant(frozen: Frozen, worker: Stand) -> None:
    run = frozen()
    run.stop_file.touch()
    worker("assert not run.stop_file.exists()")
    assert run_workers(run, quiet_stdout=True) == 0


def test_an_export_is_tried_once(frozen: Frozen, worker: Stand) -> None:
    run = frozen()
    worker(f"assert sys.argv[2] == '--export', sys.argv\n{DIE}")
    with pytest.raises(errors.LostRankError):
        run_workers(run, quiet_stdout=True, export=run.path / "weights_out")
    assert [event["event"] for event in run.events()] == ["created", "exporting", "export_failed"]


def test_handlers_and_lock_are_given_back(frozen: Frozen, worker: Stand) -> None:
    run, before = frozen(), signal.getsignal(signal.SIGTERM)
    worker("")
    for _ in range(2):
        assert run_workers(run, quiet_stdout=True) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failure_while_leaving_for_returned_devices_is_followed_by_a_start(
    frozen: Frozen, worker: Stand, tmp_path: Path
) -> None:
    sound = tmp_path / "sound"
    sound.write_text("2")
    run = frozen(
        *("strategy=accelerate", "cluster.gpus_per_node=4", "supervise.elastic=true"),
        f"supervise.health_command='cat {sound}'",
    )
    worker(
        f"sound = Path({str(sound)!r})\nif start == 1:\n    sound.write_text('4')\n"
        f"    while not run.leave_file.exists(): time.sleep(0.05)\n    {DIE}"
        "assert run.plan().world_size == 4 and not run.leave_file.exists()\n"
    )
    assert run_workers(run, quiet_stdout=True) == 0
    assert len(events(run, "restarting")) == 1


def test_a_host_that_goes_when_all_is_done_is_not_missed(
    frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lost = frozen(), Lost(host="b", ranks=range(1, 2), why="no word from its launcher for 60 s")
    last = ["started", "finished"]

    def start(run: RunDir, requests: Any, **rest: Any) -> Ending:
        run.log_event(last.pop(0))
        (run.logs / "stderr.log").touch()
        return Ending(code=9, world_size=2, log=run.logs / "stderr.log", log_from=0, beats=(), lost=(lost,))

    monkeypatch.setattr(supervisor, "start", start)
    assert run_workers(run, quiet_stdout=True) == 0
    assert [event["cause"] for event in events(run, "failed")] == ["lost_node"]  # in the start before
