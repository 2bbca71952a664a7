"""`plan --why`, `--sensitivity` and `report=` as a person meets them, in text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strategies
from launcher.verbs import plan
from launcher.verbs.plan import Questions

Call = Callable[..., Any]
PLAN = ("plan", "model=llama3_8b", "cluster=h100_sxm", "strategy=deepspeed")


def test_our_flags_are_taken_out_and_the_rest_is_left() -> None:
    asked, rest = plan.take(
        ["model=x", "--why", "tp=4,pp=2", "--cfg", "job", "--why=zero_stage=1", "--sensitivity"]
    )
    assert asked == Questions(why=({"tp": 4, "pp": 2}, {"zero_stage": 1}), sensitivity=True)
    assert rest == ["model=x", "--cfg", "job"]
    assert plan.take(["a=b"]) == (Questions(), ["a=b"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--why",), "--why names no plan; write --why tp=4,pp=2"),
        (("--why", "--sensitivity"), "does not say key=value"),
        (("--why", "zero=1"), "'zero' is no key of a plan; did you mean 'zero_stage'?"),
        (("--wyh", "tp=4"), "'--wyh' is not a flag; did you mean '--why'?"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_a_configuration_error(
    call: Call, words: tuple[str, ...], says: str
) -> None:
    outcome = call(*PLAN, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--why=tp=2", "--sensitivity"])
def test_only_plan_explains(call: Call, flag: str) -> None:
    outcome = call("train", "strategy=fake", flag)
    assert outcome.code == 2
    assert (
        f"{flag.split('=')[0]} is a flag of `meshwright plan`; leave it out of `meshwright train`"
        in outcome.err
    )


def test_why_answers_behind_the_plan(call: Call) -> None:
    outcome = call(*PLAN, "--why", "zero_stage=0", "--why", "tp=3")
    assert outcome.code == 0, outcome.err
    plan, first, second = outcome.out.split("why not ")
    assert "llama3_8b" in plan
    assert first.startswith("plan.zero_stage=0?\n  ")
    assert second.startswith("plan.tp=3?\n  not possible: ")


def test_the_same_as_one_document(call: Call, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    data = call(*PLAN, "--why", "zero_stage=0,tp=1", "--sensitivity", f"report={page}", "--json").json
    (why,) = data["why"]
    assert why["question"] == {"plan.zero_stage": 0, "plan.tp": 1}
    assert why["verdict"] in ("chosen", "does not fit", "slower", "not slower")
    assert why["plan"]["zero_stage"] == 0
    assert {shift["key"] for shift in data["sensitivity"]["shifts"]} == {
        "cluster.links[0].gb_per_s",
        "cluster.links[0].latency_us",
        "cluster.gpu.memory_gib",
    }
    assert data["report"] == str(page)
    words = page.read_text(encoding="utf-8")
    assert "why not plan.zero_stage=0, plan.tp=1?" in words
    assert "Sensitivity" in words


def test_goals_that_are_not_about_speed_are_not_explained_by_it(call: Call) -> None:
    outcome = call(*PLAN, "goal=largest_micro_batch", "--sensitivity")
    assert outcome.code == 2
    assert (
        "--why and --sensitivity compare the fastest plans; leave goal=largest_micro_batch out" in outcome.err
    )


def test_without_questions_nothing_is_added(call: Call) -> None:
    data = call(*PLAN, "--json").json
    assert not {"why", "sensitivity", "report"} & set(data)


def test_the_report_is_named_in_the_text(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call(*PLAN, "report=out/plan.html")
    assert f"report    {tmp_path / 'out' / 'plan.html'}" in outcome.out
    assert (tmp_path / "out" / "plan.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_report_that_cannot_be_written_is_one_sentence(call: Call, tmp_path: Path) -> None:
    outcome = call(*PLAN, f"report={tmp_path}")
    assert outcome.code == 1
    assert f"report={tmp_path} cannot be written: Is a directory" in outcome.err


def test_jobs_of_a_sweep_need_pages_of_their_own(call: Call, tmp_path: Path) -> None:
    sweep = (*PLAN, "--multirun", "plan.zero_stage=2,3")
    page = tmp_path / "plan.html"
    outcome = call(*sweep, f"report={page}")
    assert outcome.code == 2
    assert f"report={page} would be written by 2 jobs" in outcome.err
    assert not page.exists()
    assert call(*sweep, f"report={tmp_path}/${{plan.zero_stage}}.html").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.html", "3.html"]


def test_training_writes_the_page_too(call: Call, tmp_path: Path) -> None:
    words = ("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000")
    short = ("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=2")
    outcome = call("train", *words, *short, f"run_dir={tmp_path / 'run'}", f"report={tmp_path / 'plan.html'}")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "plan.html").exists()


def test_no_jobs_write_no_pages() -> None:
    plan.check_reports([])


def test_every_engine_stands_beside_the_choice_whichever_is_asked(call: Call, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    told = [
        call("plan", "model=llama3_8b", "cluster=h100_sxm", f"strategy={name}").out
        for name in ("deepspeed", "any")
    ]
    rows = [text.split("every engine's best plan")[1].splitlines()[2:6] for text in told]
    assert rows[0] == rows[1]
    assert {row.split()[0] for row in rows[0]} == set(strategies.engines())
    data = call(*PLAN, f"report={page}", "--json").json
    assert [entry["strategy"] for entry in data["engines"]] == [row.split()[0] for row in rows[0]]
    chosen = next(entry for entry in data["engines"] if entry["is_chosen"])
    assert chosen["plan"]["strategy"] == data["strategy"] == "deepspeed"
    assert chosen["predictions"] == data["predictions"]
    assert "Engines side by side" in page.read_text(encoding="utf-8")


def test_a_frozen_plan_holds_no_other_engines(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("strategy=fake", "experiment=smoke", "checks.resume_is_exact=false", f"run_dir={run}")
    outcome = call("train", *words)
    assert outcome.code == 0, outcome.err
    assert "engines" not in json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert "every engine's best plan" not in outcome.out


def test_the_largest_micro_batch_names_no_winner(call: Call) -> None:
    outcome = call(*PLAN, "goal=largest_micro_batch", "--json")
    assert outcome.code == 0, outcome.err
    assert "engines" not in outcome.json
