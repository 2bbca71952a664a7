"""`sweep` and `best` from the command line: one ranking, points that fail or wait, and how a sweep goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.errors import DeviceMemoryError, UnsoundNodeError
from launcher.output import Output
from launcher.run_dir import RunDir, open_run
from launcher.sweep.folder import lock, open_sweep
from launcher.verbs import drive

Call = Callable[..., Any]
SMALL = (
    *("strategy=fake", "cluster.gpus_per_node=1", "data.max_bytes=200000", "training.sequence_length=32"),
    *("training.global_batch_size=8", "monitor=none"),
)
POINTS = ("plan.micro_batch_size=1,2,4", "sweep.steps=12")
NAMES = [f"0{number}-micro_batch_size-{size}" for number, size in ((1, 1), (2, 2), (3, 4))]


def events(folder: Path, name: str) -> list[str]:
    return [event["event"] for event in open_run(folder / name).events()]


def forget(folder: Path, name: str) -> None:
    """Let a point be as it was before it was started."""
    run = RunDir(path=folder / name)
    run.events_file.write_text(run.events_file.read_text().splitlines()[0] + "\n")
    run.metrics_file.write_text("")


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "copy"))


def test_a_sweep_is_ranked_and_told_again(call: Call, copy: Path) -> None:
    told = call("sweep", str(copy), "--json").json
    assert told["is_over"] and told["winner"] in NAMES
    assert sorted(point["name"] for point in told["points"]) == NAMES
    assert told["accuracy"][0]["num_points"] == 3 and told["accuracy"][0]["after"] is not None
    assert Path(told["page"]).read_text().startswith("<!DOCTYPE html>")
    text = call("sweep", str(copy)).out
    assert "micro_batch_size=3" in text and "does not divide training.global_batch_size=8" in text
    assert f"fastest   {told['winner']}" in text
    assert f"`meshwright best {copy}` prints the command" in text


def test_trials_write_no_checkpoint_and_evaluate_nothing(swept: Path) -> None:
    for name in NAMES:
        run = open_run(swept / name)
        assert not list(run.checkpoints.iterdir())
        finished = next(event for event in run.events() if event["event"] == "finished")
        assert finished["step"] == 12 and finished["validation_loss"] is None


def test_the_winner_is_launched_in_full_with_its_plan_pinned(call: Call, swept: Path) -> None:
    told = call("best", str(swept), "--json").json
    assert call("best", str(swept)).out.strip() == shlex.join(told["command"])
    assert told["command"][:2] == ["meshwright", "train"] and "sweep.steps=12" not in told["command"]
    planned = call("plan", *told["command"][2:], "--json").json
    frozen = open_run(swept / told["point"]).plan()
    assert planned["num_candidates"] == 1 and planned["micro_batch_size"] == frozen.micro_batch_size
    assert planned["inputs"]["training"]["num_steps"] == 300
    assert call("best", str(swept), "--per-gpu", "--json").json["point"] in NAMES


def test_what_was_measured_scales_predictions(call: Call, swept: Path) -> None:
    found = call("plan", *SMALL, f"plan.calibration='{swept}'", "--json").json["inputs"]["calibration"]
    assert found["run"] == str(swept) and found["time"] > 0


def test_a_sweep_goes_on_where_it_was(call: Call, copy: Path) -> None:
    forget(copy, NAMES[2])
    before = [events(copy, name) for name in NAMES]
    outcome = call("resume", str(copy), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["is_over"]
    after = [events(copy, name) for name in NAMES]
    assert after[:2] == before[:2] and after[2][-1] == "finished"


def test_a_point_that_fails_is_named_and_the_others_go_on(
    call: Call, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        forget(copy, name)

    def workers(run: RunDir, output: Output) -> int:
        if run.path.name == NAMES[0]:
            run.log_event("failed", message="no memory is left", exit_code=10)
            raise DeviceMemoryError("no memory is left")
        run.log_event("finished")
        return 0

    monkeypatch.setattr(drive, "work", workers)
    outcome = call("resume", str(copy))
    assert outcome.code == 0
    assert f"point {NAMES[0]} failed (exit code 10): no memory is left" in outcome.err
    assert outcome.out.count("failed (10): no memory is left") == 1
    for name in NAMES[1:]:
        forget(copy, name)
        RunDir(path=copy / name).log_event("failed", message="gone", exit_code=12)
    monkeypatch.setattr(drive, "work", lambda run, output: 0)
    lost = call("resume", str(copy))
    assert lost.code == 9 and "no point of" in lost.err


def test_where_no_point_could_even_start_the_sweep_has_failed(
    call: Call, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        forget(copy, name)

    def unsound(run: RunDir, output: Output) -> int:
        raise UnsoundNodeError("this host did not pass its preflight")

    monkeypatch.setattr(drive, "work", unsound)
    outcome = call("resume", str(copy))
    assert outcome.code == 9 and f"no point of {copy} has finished" in outcome.err
    RunDir(path=copy / NAMES[0]).log_event("stopped", step=3)
    assert call("resume", str(copy)).code == 0, "somebody has asked for the end"


def test_an_interruption_leaves_what_is_finished(
    call: Call, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(copy, NAMES[1])
    forget(copy, NAMES[2])
    started: list[str] = []

    def workers(run: RunDir, output: Output) -> int:
        started.append(run.path.name)
        return 130

    monkeypatch.setattr(drive, "work", workers)
    outcome = call("resume", str(copy))
    assert (outcome.code, started) == (130, [NAMES[1]])
    assert f"interrupted; `meshwright resume {copy}` takes up the points that are left" in outcome.err
    assert "created, step 0 of 12" in outcome.out and "finished" in outcome.out


def test_a_dry_run_writes_nothing(call: Call, tmp_path: Path) -> None:
    outcome = call("sweep", *SMALL, *POINTS, f"run_dir={tmp_path / 's'}", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert [point["words"] for point in outcome.json["points"]] == [
        [f"plan.micro_batch_size={size}"] for size in (1, 2, 4)
    ]
    assert not (tmp_path / "s").exists()


def test_a_dry_run_on_slurm_prints_each_call(call: Call, tmp_path: Path) -> None:
    words = ("submit=slurm", "cluster.num_nodes=1,2", "sweep.max_parallel=1", f"run_dir={tmp_path / 's'}")
    outcome = call("sweep", *SMALL, *words, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    first, second = outcome.json["commands"]
    assert first[0] == "sbatch" and "--nodes=1" in first and not any("dependency" in word for word in first)
    assert "--nodes=2" in second and "--dependency=afterany:JOB" in second
    assert str(tmp_path / "s" / "02-cluster.num_nodes-2") in second
    assert shlex.join(second) in call("sweep", *SMALL, *words, "--dry-run").out


def test_a_sweep_is_gone_on_with_once_at_a_time(call: Call, copy: Path) -> None:
    descriptor = lock(open_sweep(copy))
    try:
        outcome = call("resume", str(copy))
    finally:
        os.close(descriptor)
    assert outcome.code == 5 and "is being gone on with by another `meshwright sweep`" in outcome.err
    assert call("sweep", str(copy)).code == 0, "it may be told of meanwhile"


def test_where_nothing_can_be_trained_nothing_is_written(call: Call, tmp_path: Path) -> None:
    outcome = call("sweep", *SMALL, "plan.micro_batch_size=3,5", f"run_dir={tmp_path / 's'}")
    assert outcome.code == 3
    assert "none of the 2 points can be trained: plan.micro_batch_size=3" in outcome.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("sweep", "nowhere"), 5, "nowhere is not the folder of a sweep: sweep.json is missing"),
        (("best", "nowhere"), 5, "nowhere is not the folder of a sweep"),
        (("best",), 2, "`meshwright best SWEEP_DIR` takes the folder of one sweep"),
        (("best", "--all"), 2, "--per-gpu and --json are its flags"),
        (("sweep",), 2, "was given one point; list values"),
        (("sweep", "--why", "tp=1"), 2, "--why is a flag of `meshwright plan`"),
        (("train", "top_k=3"), 2, "unknown key 'top_k'"),
        (("train", "sweep.steps=3"), 2, "top_k and sweep.* are keys of `meshwright sweep`"),
    ],
)
def test_wrong_words_are_one_sentence(call: Call, words: tuple[str, ...], code: int, sentence: str) -> None:
    outcome = call(*words)
    assert outcome.code == code and sentence in outcome.err


def test_a_sweep_here_is_not_cancelled_from_elsewhere(call: Call, swept: Path) -> None:
    outcome = call("cancel", str(swept))
    assert outcome.code == 2 and "stop that with Ctrl-C" in outcome.err
    assert not list(swept.glob("*/stop"))


def test_nothing_measured_has_no_best(call: Call, copy: Path) -> None:
    for name in NAMES:
        forget(copy, name)
    outcome = call("best", str(copy))
    assert outcome.code == 9 and "has a step after warm-up yet" in outcome.err


# ---- Slurm, by stand-ins; the real one is in tests/slurm -----------------------------------------------------------


@pytest.fixture(scope="module")
def queued_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep of four points, two jobs at a time, and stand-ins for Slurm's commands that queued it."""
    folder = tmp_path_factory.mktemp("queued")
    tools = folder / "tools"
    tools.mkdir()
    note = 'for word in "$@"; do printf "%s\\0" "$word"; done >> "$0.said"; printf "\\n" >> "$0.said"'
    scripts = {
        "sbatch": f'{note}; echo $(wc -l < "$0.said")',
        "scancel": note,
        "scontrol": 'grep -qx "$4" "$0.ended" 2>/dev/null && state=COMPLETED; echo JobId=$4 JobState=${state:-PENDING}',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    words = ("submit=slurm", "plan.micro_batch_size=1,2,4,8", "cluster.num_nodes=1", "sweep.max_parallel=2")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("PATH", f"{tools}:/usr/bin:/bin")
        assert cli.run(["sweep", *SMALL, *words, f"run_dir={folder / 's'}", "submit.after=afterok:99"]) == 0
    assert "queued, step 0 of 300" in out.getvalue()
    return folder


@pytest.fixture
def queued(queued_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in `tmp_path`; returns the folder of the stand-ins."""
    shutil.copytree(queued_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    return tmp_path / "tools"


def dependencies(tools: Path) -> list[list[str]]:
    lines = (tools / "sbatch.said").read_text().split("\0\n")
    return [[word for word in line.split("\0") if "dependency" in word] for line in lines if line]


def test_so_many_jobs_run_side_by_side_as_are_allowed(queued: Path) -> None:
    assert dependencies(queued) == [
        ["--dependency=afterok:99"],
        ["--dependency=afterok:99"],
        ["--dependency=afterok:99,afterany:1"],
        ["--dependency=afterok:99,afterany:2"],
    ]


def test_going_on_queues_what_is_neither_finished_nor_queued(
    call: Call, queued: Path, tmp_path: Path
) -> None:
    assert call("resume", str(tmp_path / "s")).code == 0
    assert len(dependencies(queued)) == 4, "all are in the queue already"
    (queued / "scontrol.ended").write_text("1\n2\n")
    open_run(tmp_path / "s" / "01-micro_batch_size-1").log_event("finished")
    outcome = call("resume", str(tmp_path / "s"))
    assert outcome.out.count("submitted") == 1 and "submitted 5  02-micro_batch_size-2" in outcome.out
    assert dependencies(queued)[4] == ["--dependency=afterok:99,afterany:3"]


def test_what_slurm_refuses_half_way_is_said_with_how_to_go_on(
    call: Call, queued: Path, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        open_run(tmp_path / "s" / f"0{number}-micro_batch_size-{2 ** (number - 1)}").log_event("finished")
    (queued / "scontrol.ended").write_text("1\n2\n3\n4\n")
    (queued / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: too many jobs' >&2\nexit 1\n")
    outcome = call("resume", str(tmp_path / "s"))
    assert outcome.code == 8
    assert "too many jobs" in outcome.err
    assert f"`meshwright resume {tmp_path / 's'}` queues 04-micro_batch_size-8 and those after" in outcome.err


def test_a_sweep_is_cancelled_as_a_whole(call: Call, queued: Path, tmp_path: Path) -> None:
    done = call("cancel", str(tmp_path / "s"), "--json").json["done"]
    assert list(done.values()) == [[f"job {number} is cancelled"] for number in range(1, 5)]
    (queued / "scontrol.ended").write_text("1\n2\n3\n4\n")
    assert call("cancel", str(tmp_path / "s")).out == "no job of this sweep is queued\n"


def test_points_that_were_never_queued_are_left_alone(call: Call, queued: Path, tmp_path: Path) -> None:
    forget(tmp_path / "s", "04-micro_batch_size-8")
    done = call("cancel", str(tmp_path / "s"), "--json").json["done"]
    assert done["04-micro_batch_size-8"] == [] and done["03-micro_batch_size-4"] == ["job 3 is cancelled"]
    assert not (tmp_path / "s" / "04-micro_batch_size-8" / "stop").exists()


def test_the_winner_of_a_queued_sweep_is_submitted(call: Call, queued: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "s" / "02-micro_batch_size-2")
    steps = [{"step": step, "step_time_s": 0.5, "loss": 1.0} for step in range(1, 9)]
    run.metrics_file.write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    told = call("best", str(tmp_path / "s"), "--json").json
    assert told["command"][1] == "submit" and "submit=slurm" in told["command"]
    assert told["point"] == "02-micro_batch_size-2" and told["step_s"] == 0.5
