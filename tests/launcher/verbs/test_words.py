"""Words behind a verb are jobs or a run directory, and never a flag of another verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import ConfigError, RunDirError
from launcher.output import Output
from launcher.verbs import words

QUIET = Output(as_json=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["runs/x"], True), (["model=x"], False), ([], False), (["a", "b"], False), (["--help"], False)],
)
def test_one_word_without_a_value_is_a_run(arguments: list[str], expected: bool) -> None:
    assert words.names_a_run(arguments) is expected


@pytest.mark.parametrize("verb", ["train", "submit", "compare", "verify"])
@pytest.mark.parametrize("flag", ["--why", "--why=tp=2", "--sensitivity"])
def test_only_plan_explains(verb: str, flag: str) -> None:
    with pytest.raises(
        ConfigError, match=f"is a flag of `meshwright plan`; leave it out of `meshwright {verb}`"
    ):
        words.jobs(verb, [flag], QUIET)


def test_several_engines_are_for_compare_alone() -> None:
    asked = ["strategies=[fake,accelerate]", "cluster.gpus_per_node=1"]
    with pytest.raises(ConfigError, match="is a key of `meshwright compare`"):
        words.jobs("train", asked, QUIET)
    [job] = words.jobs("compare", asked, QUIET)
    assert job.strategies == ("fake", "accelerate")


def test_help_is_no_document() -> None:
    assert words.only_asks(["--cfg", "job"]) and not words.only_asks(["model=llama3_8b"])
    with pytest.raises(ConfigError, match="--json has no document for --cfg job"):
        words.jobs("plan", ["--cfg", "job"], Output(as_json=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fast", "runs/x"], "'--fast' is not a flag of `meshwright show RUN_DIR`"),
        ([], "takes one run directory, not 0 words"),
        (["a", "b"], "takes one run directory, not 2 words"),
    ],
)
def test_a_run_directory_is_the_only_word(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        words.open_run("show", arguments)


def test_what_is_no_run_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=str(tmp_path)):
        words.open_run("show", [str(tmp_path)])


def test_values_of_a_verb_stand_apart_from_words_of_the_cluster() -> None:
    given = ["rounds=3", "cluster=local", "cluster.gpus_per_node=2"]
    assert words.of_cluster("probe x", given, own=["rounds"]) == ({"rounds": 3}, given[1:])
    with pytest.raises(ConfigError, match=r"'round=3' is not a word of `probe x`; did you mean 'rounds'"):
        words.of_cluster("probe x", ["round=3"], own=["rounds"], known=["nccl"])
