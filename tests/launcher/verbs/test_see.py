"""The two verbs that look at runs: words, refusals, what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(tmp_path: Path, call: Callable[..., Any]) -> Path:
    """A run that was frozen and did not train."""
    from launcher.compose import jobs
    from launcher.freeze import freeze
    from launcher.output import Output

    words = [
        "strategy=fake",
        "cluster.gpus_per_node=1",
        "data.max_bytes=200000",
        f"run_dir={tmp_path / 'run'}",
    ]
    (job,) = jobs(words)
    return freeze(job, Output(as_json=True)).path


def test_a_page_lies_in_its_run(run: Path, call: Callable[..., Any]) -> None:
    outcome = call("report", str(run))
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"report     {run / 'report.html'}\n"
    assert "<h1>run</h1>" in (run / "report.html").read_text()


def test_a_page_of_several_runs_is_named(run: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    outcome = call("report", str(run), str(run))
    assert outcome.code == 2
    assert "a page of 2 runs belongs to none of them; name it, as in out=compare.html" in outcome.err
    outcome = call("report", str(run), str(run), f"out={tmp_path / 'both.html'}", "--json")
    assert outcome.json == {"report": str(tmp_path / "both.html"), "runs": [str(run), str(run)]}
    assert "2 runs: run, run" in (tmp_path / "both.html").read_text()
    outcome = call("report", str(run), f"out={tmp_path}")
    assert f"out={tmp_path} cannot be written: Is a directory; name a file" in outcome.err


def test_one_look_from_where_nobody_can_watch(run: Path, call: Callable[..., Any]) -> None:
    outcome = call("watch", str(run))
    assert outcome.code == 0, outcome.err
    assert "run: created" in outcome.out
    assert call("watch", str(run), "--json").json["state"] == "created"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report"], "`meshwright report` needs a run directory"),
        (["report", "--fast"], "'--fast' is not a flag of `meshwright report`; --json is the only one"),
        (["report", "x", "out="], "takes one out=FILE"),
        (["watch"], "`meshwright watch` needs a run directory"),
        (["watch", "a", "b"], "`meshwright watch` takes one run directory, not 2 words"),
        (["watch", "a", "--live"], "'--live' is not a flag of `meshwright watch`; --once and --json"),
    ],
)
def test_words_that_cannot_be_meant(call: Callable[..., Any], words: list[str], sentence: str) -> None:
    outcome = call(*words)
    assert outcome.code == 2
    assert sentence in outcome.err


def test_a_folder_that_is_no_run(call: Callable[..., Any], tmp_path: Path) -> None:
    assert call("report", str(tmp_path)).code == 5
