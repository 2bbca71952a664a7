"""The container files as far as text can tell: sources exist, bases are pinned, the steps are those of bootstrap.sh."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.environments import catalogue

FOLDER = Path(__file__).resolve().parents[1] / "containers"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
DEFINITIONS = sorted(FOLDER.glob("*.def"))
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def sections(path: Path) -> dict[str, list[str]]:
    """Section -> lines of an Apptainer definition; the header is ''."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("%"):
            name = line.strip()
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


def commands_of(path: Path) -> list[str]:
    """Commands that make the image, in order, whichever file says so."""
    if path.suffix == ".def":
        lines = sections(path)["%post"]
        return [line for line in lines if line.split()[0] not in ("set", "cd", "export")]
    runs = [rest for word, rest in instructions(path) if word == "RUN"]
    return [command.strip() for run in runs for command in run.split("&&")]


def sources_of(path: Path) -> list[str]:
    """What comes from the checkout."""
    if path.suffix == ".def":
        return [line.split()[0] for line in sections(path)["%files"]]
    return [source for word, rest in instructions(path) if word == "COPY" for source in rest.split()[:-1]]


def base_of(path: Path) -> str:
    if path.suffix == ".def":
        return dict(line.split(": ") for line in sections(path)[""])["From"]
    [base] = [rest for word, rest in instructions(path) if word == "FROM"]
    return base


def test_there_is_a_definition_for_every_dockerfile() -> None:
    assert [path.stem for path in DOCKERFILES] == [path.stem for path in DEFINITIONS] == ["cpu", "cuda"]


@pytest.mark.parametrize("path", [*DOCKERFILES, *DEFINITIONS], ids=lambda path: path.name)
def test_a_container_file_is_sound(path: Path, repository: Path) -> None:
    assert re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w.-]+", base_of(path)), "a base is pinned to one version"
    for source in sources_of(path):
        assert (repository / source).exists(), f"{path.name}: {source}"
    commands = commands_of(path)
    assert "./bootstrap.sh" in commands
    for command in commands:
        words = shlex.split(command)
        if "meshwright" in words[0]:
            assert words[1:3] == ["env", "create"]
            assert words[3] in catalogue.names()
            continue
        assert command == "./bootstrap.sh" or words[0] in ("apt-get", "rm"), command
        if "install" in words:
            assert {"--yes", "--no-install-recommends"} <= set(words)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_and_definition_take_the_same_steps(path: Path) -> None:
    other = path.with_suffix(".def")
    assert base_of(path) == base_of(other)
    assert sources_of(path) == sources_of(other)
    strip = [command.replace(".venv/bin/", "") for command in commands_of(other)]
    assert commands_of(path) == strip
    text = other.read_text()
    variables = [rest for word, rest in instructions(path) if word == "ENV"]
    for variable in re.findall(r"(MESHWRIGHT_\w+=\S+)", " ".join(variables)):
        assert text.count(variable) == 2, f"{variable}: while it is built and while it runs"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_commands_are_ours(call: Callable[..., Any], path: Path) -> None:
    found = instructions(path)
    assert {word for word, _ in found} <= KNOWN
    assert found[0][0] == "FROM"
    # A source that comes after the step that needs it would be missing there.
    last_copy = max(place for place, (word, _) in enumerate(found) if word == "COPY")
    assert last_copy < found.index(("RUN", "./bootstrap.sh"))
    [words] = [json.loads(rest) for word, rest in found if word == "CMD"]
    if words[0] == "train":
        assert call("plan", "--cfg", "job", *words[1:]).code == 0
    else:
        assert call(*words).code == 0


def test_bootstrap_is_what_continuous_integration_runs(repository: Path) -> None:
    assert "make check" in (repository / ".ci" / "run").read_text()
    makefile = (repository / "Makefile").read_text()
    assert re.search(r"^check: \.venv/ready", makefile, flags=re.M)
    assert re.search(r"^\.venv/ready:.*\n\t\./bootstrap\.sh$", makefile, flags=re.M)
    needed = {
        "bootstrap.sh",
        *re.findall(r"-c (constraints\.txt)", (repository / "bootstrap.sh").read_text()),
    }
    for path in (*DOCKERFILES, *DEFINITIONS):
        assert {*needed, "pyproject.toml", "README.md", "LICENSE"} <= set(sources_of(path))
        assert {"launcher", "strategies", "hydra_configs"} <= set(sources_of(path))
