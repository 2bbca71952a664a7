from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher import provenance
from launcher.environments.interpreter import Interpreter


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(
        ["git", "-C", str(directory), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_and_dirty_flag(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_outside_a_checkout_there_is_none(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) is None


def test_no_environment_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-write-me")
    python = Interpreter(path="/opt/python", kind="named", versions={"torch": "2.9"})
    facts = provenance.collect(command=["meshwright", "train"], directory=tmp_path, interpreter=python)
    assert "do-not-write-me" not in str(facts)
    assert not set(facts) & set(os.environ)
    assert {"python", "torch", "transformers"} <= set(facts["versions"])
    assert facts["interpreter"] == {"path": "/opt/python", "kind": "named", "versions": {"torch": "2.9"}}
