"""The terminal: one picture of a run by its files."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from launcher.run_dir import RunDir
from launcher.verbs import watch


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that is going on, as files."""
    from launcher.compose import jobs
    from launcher.decode import encode

    (job,) = jobs(["strategy=fake", "cluster.gpus_per_node=1", "training.num_steps=40"])
    run = RunDir(path=tmp_path / "mine")
    run.metrics.mkdir(parents=True)
    run.config_file.write_text(yaml.safe_dump(encode(job)))
    run.plan_file.write_text(json.dumps({"format": 1, "strategy": "fake", "dp": 1}))
    records = [
        {
            "step": step,
            "time": 1000.0 + step,
            "loss": 5.0 - step / 10,
            "grad_norm": 1.0,
            "step_time_s": 2.0,
            "tokens_per_s_per_gpu": 100.0,
            "goodput": 0.75,
            "straggler_score": {"0": 0.5, "1": 2.0},
            "cpu_percent": {"node-a": 50.0},
        }
        for step in range(1, 11)
    ]
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("created", "launched", "started"):
        run.log_event(name)
    return run


def drawn(run: RunDir, *, now: float = 1015.0) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(watch.frame(run, watch.followed(run), now=now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_picture_tells_where_the_run_stands(run: RunDir) -> None:
    text = drawn(run)
    told = [
        "mine: running",
        "step 10 of 40, 1 min 00 s to go, last step 5 s ago",
        "loss",
        "█▇",
        "goodput 75%",
    ]
    told += ["slowest ranks  1: 2.00  0: 0.50", "node-a processors 50%", "started"]
    assert [words for words in told if words not in text] == []


def test_a_traced_step_tells_what_it_sent_and_no_speed(run: RunDir) -> None:
    record = json.loads(run.metrics_file.read_text().splitlines()[-1])
    del record["tokens_per_s_per_gpu"]
    traced = {**record, "step": 11, "traced": True, "exposed_communication_s": 0.125}
    with run.metrics_file.open("a") as file:
        file.write(json.dumps(traced) + "\n")
    text = drawn(run)
    assert "exposed communication 0.125 s" in text
    assert "tokens/s/GPU" in text


def test_alerts_come_with_the_events(run: RunDir) -> None:
    alert = {
        "time": time.time() + 5,
        "cause": "stalled",
        "text": "no step for 90 s",
        "run": "mine",
        "step": 1,
    }
    (run.metrics / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    assert "alert stalled no step for 90 s" in drawn(run)


def test_a_run_without_steps_has_a_picture(run: RunDir) -> None:
    run.metrics_file.unlink()
    text = drawn(run)
    assert "mine: running" in text
    assert "step 10" not in text


def test_names_and_words_of_others_are_no_markup(run: RunDir) -> None:
    run.log_event("failed", message="expected [/closing] at\x1b[2J [bold]rank 0")
    text = drawn(RunDir(path=run.path.rename(run.path.with_name("lr[low] [red]"))))
    assert "lr[low] [red]: failed" in text
    assert "expected [/closing] at [2J [bold]rank 0" in text


def test_what_happened_comes_before_what_a_low_terminal_cuts_off(run: RunDir) -> None:
    text = drawn(run)
    assert text.index("started") < text.index("slowest ranks") < text.index("node-a")


def test_the_age_of_a_checkpoint_is_that_of_now(run: RunDir) -> None:
    run.log_event("checkpoint", step=5)
    saved = list(run.events())[-1]["time"]
    assert "checkpoint 1 min 30 s old" in drawn(run, now=saved + 90)


def test_a_run_that_is_over_has_nothing_to_go(run: RunDir) -> None:
    run.log_event("stopped")
    assert "step 10 of 40, last step 5 s ago" in drawn(run)


def test_sparklines_rise_fall_and_stay_short() -> None:
    assert watch.sparkline([1, 2, 3, 8]) == "▁▂▃█"
    assert watch.sparkline([2, 2]) == "▁▁"
    assert watch.sparkline(list(range(1000)))[0] == "▁"
    assert len(watch.sparkline(list(range(1000)))) <= 48


def test_watching_goes_on_through_a_restart(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    events = {1: "failed", 3: "restarting", 4: "launched", 5: "finished"}

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) in events:
            run.log_event(events[len(looks)])

    monkeypatch.setattr(time, "sleep", sleep)
    watch.watch(run, once=False, stream=io.StringIO())
    assert len(looks) == 5


def test_watching_ends_with_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            run.log_event("finished")

    monkeypatch.setattr(time, "sleep", sleep)
    stream = io.StringIO()
    watch.watch(run, once=False, stream=stream)
    assert len(looks) == 3
    assert "mine: finished" in stream.getvalue()
