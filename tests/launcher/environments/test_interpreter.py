"""Which Python runs the workers: what it has to have, what it sees, and a run that keeps the one it began with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.environments import interpreter
from launcher.environments.interpreter import Interpreter
from launcher.errors import EngineError, LauncherError

TINY = (
    *("strategy=fake", "monitor=none", "cluster.gpus_per_node=1", "data.max_bytes=200000"),
    *("training.sequence_length=32", "training.global_batch_size=8", "training.num_steps=4"),
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another Python that has what ours has."""
    folder = tmp_path_factory.mktemp("other") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    next(folder.glob("lib/python3*/site-packages")).joinpath("ours.pth").write_text(f"{ours}\n")
    return folder / "bin" / "python"


def test_home_follows_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_HOME", "/a")
    assert interpreter.home() == Path("/a")
    monkeypatch.delenv("MESHWRIGHT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/x")
    assert interpreter.home() == Path("/x/meshwright")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert interpreter.home() == Path("/h/.local/share/meshwright")


def test_another_python_tells_what_it_has(other: Path) -> None:
    assert interpreter.is_foreign(str(other))
    assert not interpreter.is_foreign(sys.executable)
    has, ours = interpreter.ask(str(other)), interpreter.installed()
    assert has["torch"] == ours["torch"]
    assert has["python"] == ours["python"] == ".".join(map(str, sys.version_info[:2]))
    picked = interpreter.frozen_versions(has, distribution="accelerate")
    assert set(picked) == {"python", "torch", "transformers", "accelerate"}


def test_a_python_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none does not exist on"):
        interpreter.ask(str(tmp_path / "none"))
    file = tmp_path / "file"
    file.write_text("#!/bin/sh\necho too old >&2; exit 3\n")
    file.chmod(0o644)
    with pytest.raises(EngineError, match=r"is not executable on"):
        interpreter.ask(str(file))
    file.chmod(0o755)
    with pytest.raises(EngineError, match=r"cannot run the workers \(too old\); give a Python 3.10 or newer"):
        interpreter.ask(str(file))
    file.write_bytes(b"\x00\x01")
    with pytest.raises(EngineError, match=r"file cannot be run: Exec format error"):
        interpreter.ask(str(file))


def test_another_python_sees_our_packages_and_nothing_beside_them() -> None:
    given = {"PYTHONPATH": "/mine", "PYTHONHOME": "/p", "VIRTUAL_ENV": "/v", "PATH": "/usr/bin", "A": "b"}
    made = interpreter.surroundings(given, "/other/bin/python")
    assert (made["A"], made["PATH"], made["PYTHONNOUSERSITE"]) == ("b", "/other/bin:/usr/bin", "1")
    assert not {"PYTHONHOME", "VIRTUAL_ENV"} & set(made)
    folder = Path(made["PYTHONPATH"])
    assert {path.name for path in folder.iterdir()} == {"launcher", "strategies", "hydra_configs"}
    assert (folder / "launcher").resolve() == Path(interpreter.__file__).resolve().parents[1]
    assert interpreter.surroundings(given, sys.executable)["PYTHONPATH"].endswith(":/mine")


def test_links_of_a_moved_checkout_are_made_anew() -> None:
    link = interpreter.import_folder() / "launcher"
    link.unlink()
    link.symlink_to("/gone")
    assert (interpreter.import_folder() / "launcher" / "cli.py").is_file()


def test_a_home_that_cannot_be_written_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_HOME", "/proc/1/home")
    with pytest.raises(
        LauncherError, match=r"cannot be written: .*; set MESHWRIGHT_HOME to a writable folder"
    ):
        interpreter.import_folder()


def test_versions_have_to_be_those_of_the_start(tmp_path: Path) -> None:
    frozen = Interpreter(path="/p", kind="own", versions={"torch": "2.9", "deepspeed": "0.19.8"})
    interpreter.check(frozen, has={"torch": "2.9", "deepspeed": "0.19.8", "rich": "1"}, record=tmp_path)
    with pytest.raises(EngineError, match=r"has torch 2\.8 and the run was frozen with 2\.9 \(/p\)"):
        interpreter.check(frozen, has={"torch": "2.8"}, record=tmp_path)
    with pytest.raises(
        EngineError, match=r"has deepspeed not installed and .* by editing interpreter.versions"
    ):
        interpreter.check(frozen, has={"torch": "2.9"}, record=tmp_path)


def test_who_starts_the_workers(other: Path, tmp_path: Path) -> None:
    record = tmp_path / "env.json"
    torch = {"torch": interpreter.installed()["torch"]}
    assert interpreter.find(None, record=record) == sys.executable
    moved = Interpreter(path="/gone/python", kind="own", versions=torch)
    assert interpreter.find(moved, record=record) == sys.executable
    there = Interpreter(path=str(other), kind="environment", versions=torch)
    assert interpreter.find(there, record=record) == str(other)
    gone = Interpreter(path="/gone/python", kind="environment", versions=torch)
    with pytest.raises(
        EngineError, match=r"/gone/python does not exist on .*; `meshwright env create` builds it"
    ):
        interpreter.find(gone, record=record)
    for path in (sys.executable, str(other), "/gone/python"):
        with pytest.raises(EngineError, match=r"the run was frozen with 0"):
            interpreter.find(Interpreter(path=path, kind="own", versions={"torch": "0"}), record=record)


def test_an_engine_that_this_process_cannot_import() -> None:
    interpreter.check_import("json", strategy="one")
    assert interpreter.can_import("json.decoder")
    assert not interpreter.can_import("no_such.inner")
    interpreter.check_import(None, strategy="fake")
    with pytest.raises(EngineError, match=r"strategy=x needs the package 'no_such', which .* cannot import"):
        interpreter.check_import("no_such", strategy="x")


def test_a_run_keeps_the_python_it_began_with(call: Callable[..., Any], other: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = call("train", *TINY, f"submit.python={other}", f"run_dir={run}", "stop_at_step=2", "--json")
    assert first.code == 0, first.err
    env = json.loads((run / "env.json").read_text())
    assert (env["interpreter"]["path"], env["interpreter"]["kind"]) == (str(other), "named")
    assert call("resume", str(run), "--json").json["state"] == "finished"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["command"][0] for event in events if event["event"] == "launched"] == [str(other)] * 2


def test_every_rank_looks_at_its_own_versions(call: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", *TINY, f"run_dir={run}", "stop_at_step=2", "--json").code == 0
    env = json.loads((run / "env.json").read_text())
    env["interpreter"]["versions"]["torch"] = "1.0"
    (run / "env.json").write_text(json.dumps(env))
    says = "and the run was frozen with 1.0"
    outcome = call("resume", str(run))
    assert outcome.code == 7
    assert says in outcome.err
    command = [sys.executable, "-m", "launcher.training.worker", str(run)]
    done = subprocess.run(
        command,
        env=interpreter.surroundings(os.environ, sys.executable),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert says in done.stderr
