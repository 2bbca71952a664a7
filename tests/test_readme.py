"""The README tells the truth: its commands run, its tree is the tree, its CI job is a CI job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import strategies
from launcher.cli import VERBS

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.S | re.M)
    return [text for word, text in found if re.fullmatch(language, word)]


def commands() -> list[str]:
    lines = [line.removeprefix("$ ") for block in blocks("(?:bash|console)") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("meshwright", "torchrun"))]


def test_there_are_commands_to_test() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("meshwright plan")])
def test_plan_commands_run(call: Callable[..., Any], command: str) -> None:
    outcome = call(*shlex.split(command)[1:])
    if "zero_optimisation" in command:
        assert outcome.code == 2
        assert outcome.err.strip() in TEXT
    else:
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("command", [c for c in commands() if " train " in c])
def test_train_commands_compose(call: Callable[..., Any], command: str) -> None:
    words = shlex.split(command)
    rest = words[words.index("train") + 1 :]
    outcome = call("plan", "--cfg", "job", *rest)
    assert outcome.code == 0, outcome.err


def test_the_plan_shown_is_the_plan_made(call: Callable[..., Any]) -> None:
    command, *shown = next(block for block in blocks("console") if "plan model=" in block).splitlines()
    printed = call(*shlex.split(command.removeprefix("$ "))[1:]).out
    for line in shown:
        assert line.strip() in ("", "...") or line in printed


def test_every_verb_is_shown() -> None:
    assert all(any(f"meshwright {verb}" in command for command in commands()) for verb in VERBS)


def test_the_tree_names_every_file() -> None:
    tree = next(block for block in blocks("") if block.startswith("launcher/"))
    for package in ("launcher", "strategies"):
        for path in (REPOSITORY / package).rglob("*.py"):
            if not path.name.startswith("__"):
                assert re.search(rf"\b{re.escape(path.name)}", tree), f"{path} is not in the README's tree"
    # Not all below the repository: that would be every environment in .venv, and whatever is called alike there.
    folders = ("launcher", "strategies", "tests", "benchmarks")
    there = {path.name for folder in folders for path in (REPOSITORY / folder).rglob("*.py")}
    assert set(re.findall(r"\b([a-z_]+\.py)\b", tree)) <= there, "the README's tree names what does not exist"


def test_the_ci_job_is_one() -> None:
    job = yaml.safe_load(blocks("yaml")[0])["jobs"]["smoke"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert any("meshwright train experiment=smoke" in run for run in runs)


def test_the_strategy_table_is_what_the_capabilities_say() -> None:
    for name in strategies.ENGINE_PACKAGES:
        capabilities = strategies.load(name).capabilities
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2] == ", ".join(map(str, sorted(capabilities.zero_stages)))
        assert set(cells[3].split(", ")) == set(capabilities.precisions)
        stages = ", ".join(map(str, sorted(capabilities.offload_optimizer_stages)))
        assert (f"optimizer ({stages})" in cells[4]) is bool(stages)
        stages = ", ".join(map(str, sorted(capabilities.offload_parameters_stages)))
        assert (f"parameters ({stages})" in cells[4]) is bool(stages)


def test_links_lead_somewhere() -> None:
    for page in (
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "docs" / "architecture.md",
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_two_commands_are_make_targets() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert {"train", "test"} == set(re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.M))
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in ("train", "test", "check"))
