"""The commands of a build, and real builds of an engine that is one small wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.environments import build, catalogue
from launcher.environments.build import Step
from launcher.errors import EngineError

PINS = {"torch": "2.9.0", "setuptools": "80.0", "engine": "1.0"}


def create(name: str = "tinyengine", base: str = sys.executable) -> tuple[catalogue.Environment, bool]:
    return build.create(name, torch="cpu", base=base)


# ---- the commands of a build --------------------------------------------------------------------------------------


def commands(steps: list[Step]) -> list[str]:
    return [" ".join(step.command) for step in steps]


def test_without_uv_pip_builds_everything() -> None:
    made = build.steps(Path("/e"), pins=PINS, torch="cuda", base="/p", uv=None, system="Linux")
    pip = "/e/bin/python -m pip --disable-pip-version-check install"
    assert commands(made) == [
        "/p -m venv /e",
        f"{pip} torch==2.9.0 -c /e/lock.txt",
        f"{pip} --no-deps setuptools==80.0",
        f"{pip} --no-deps --no-build-isolation -r /e/lock.txt",
    ]
    assert not any(step.otherwise for step in made)


def test_with_uv_pip_is_the_second_choice() -> None:
    made = build.steps(Path("/e"), pins=PINS, torch="cuda", base="/p", uv="/uv", system="Linux")
    assert commands(made)[-1] == (
        "/uv pip install --python /e/bin/python --no-deps --no-build-isolation -r /e/lock.txt"
    )
    assert all(step.otherwise[0].command[1:3] == ("-m", "pip") for step in made[1:])


def test_without_a_gpu_no_cuda_packages_come_along() -> None:
    for uv in (None, "/uv"):
        made = build.steps(Path("/e"), pins=PINS, torch="cpu", base="/p", uv=uv, system="Linux")
        assert "torch==2.9.0+cpu -c /e/lock.txt" in commands(made)[1]
        *fetch, last = commands(list(made[1].otherwise))
        assert (
            f"{uv or '/e/bin/uv'} pip install --python /e/bin/python --torch-backend=cpu torch==2.9.0" in last
        )
        assert [command.rpartition(" ")[2] for command in fetch] == ([] if uv else ["uv"])
    elsewhere = build.steps(Path("/e"), pins=PINS, torch="cpu", base="/p", uv=None, system="Darwin")
    assert "+cpu" not in "".join(commands(elsewhere)), "other systems have one build"


# ---- real builds --------------------------------------------------------------------------------------------------


def test_an_environment_is_built_once_found_and_rebuilt_when_broken(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not catalogue.is_here("tinyengine")
    made, is_new = create()
    assert is_new
    assert made.state == "ready"
    assert made.versions["tinyengine"] == "2.0"
    assert made.size_bytes > 1000
    assert create() == (made, False)
    assert catalogue.is_here("tinyengine")
    assert catalogue.absences(["tinyengine", "fake"]) == []
    chosen = catalogue.choose("tinyengine")
    assert (chosen.kind, chosen.path) == ("environment", str(made.python))
    assert chosen.versions == {"python": made.versions["python"], "tinyengine": "2.0"}
    # A bare torchrun out of it finds Meshwright without any variable.
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([made.python, "-c", "import launcher.errors"], env=bare, cwd="/", check=True)

    next(made.path.glob("lib/*/site-packages/tinyengine-2.0.dist-info")).rename(made.path / "moved")
    assert [environment.state for environment in catalogue.found()] == ["broken"]
    assert not catalogue.is_here("tinyengine")
    monkeypatch.setattr(build, "find_uv", lambda: None)  # by pip this time
    again, is_new = create()
    assert (again.state, is_new) == ("ready", True)

    (engine / "tinyengine.txt").write_text("-r base.txt\ntinyengine==3.0\n")
    assert [environment.state for environment in catalogue.found()] == ["outdated"]
    assert catalogue.ready("tinyengine") is None
    build.remove(again)
    assert catalogue.found() == []
    assert list(catalogue.root().iterdir()) == []


def test_a_build_that_fails_says_why_and_leaves_nothing(engine: Path) -> None:
    (engine / "tinyengine.txt").write_text("no-such-package==9.9\n")
    with pytest.raises(
        EngineError, match=r"the environment could not be built: .*no-such-package.*; see .*log"
    ):
        create()
    assert catalogue.found() == []
    assert list(catalogue.root().glob("*.log"))


def test_a_base_that_is_no_python_is_one_sentence(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"/no/python cannot be run: No such file"):
        create(base="/no/python")


@pytest.fixture
def slow_base(tmp_path: Path) -> Path:
    """A Python whose `-m venv FOLDER` begins and does not end."""
    script = tmp_path / "slow_python"
    script.write_text(f'#!/bin/sh\nmkdir -p "$3"\necho $$ > {tmp_path}/pid\nexec sleep 60\n')
    script.chmod(0o755)
    return script


def interrupted_build(script: Path, pid_file: Path) -> subprocess.Popen[bytes]:
    """Start a build as a process of its own, and return while it is at it."""
    code = (
        "import sys; from pathlib import Path; from launcher import cli; "
        "from launcher.environments import catalogue; "
        f"catalogue.LOCKS = Path({str(script.parent / 'locks')!r}); "
        f"sys.exit(cli.run(['env', 'create', 'tinyengine', 'python={script}']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_ctrl_c_leaves_nothing(engine: Path, slow_base: Path, tmp_path: Path) -> None:
    process = interrupted_build(slow_base, tmp_path / "pid")
    [building] = catalogue.found()
    assert building.state == "building"
    with pytest.raises(EngineError, match=r"is being built by another process"):
        create()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130
    assert catalogue.found() == []


def test_a_killed_build_is_detected_and_done_again(engine: Path, slow_base: Path, tmp_path: Path) -> None:
    process = interrupted_build(slow_base, tmp_path / "pid")
    process.kill()
    process.wait()
    assert catalogue.found()[0].state == "building", "what it started still writes"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while catalogue.found()[0].state == "building" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert catalogue.found()[0].state == "interrupted"
    assert catalogue.ready("tinyengine") is None
    made, is_new = create()
    assert (made.state, is_new) == ("ready", True)
