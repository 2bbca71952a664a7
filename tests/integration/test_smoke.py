"""The smoke test that other people's CI copies: one process, no network, exit code 0 or the documented one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_smoke_passes(shell: Callable[..., Any], tmp_path: Path) -> None:
    outcome = shell("train", "experiment=smoke", f"run_dir={tmp_path / 'run'}", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["state"] == "finished"
    assert "resume repeated 10 losses exactly" in outcome.err
    assert "loss fell from" in outcome.err
    assert not (tmp_path / "run" / "resume_check").exists()


def test_smoke_fails_with_its_exit_code_when_the_loss_rises(
    shell: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("training.learning_rate=3", "training.warmup_steps=0")
    outcome = shell("train", "experiment=smoke", *words, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 11, outcome.err
    assert "checks.loss_falls" in outcome.err.strip().splitlines()[-1]


def test_smoke_needs_no_network(tmp_path: Path, repository: Path) -> None:
    """Without any interface but loopback nothing is missing; without the right to unshare there is nothing to show."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.fail("this machine does not let us leave the network (unshare -rn)")
    command = [
        "unshare",
        "-rn",
        sys.executable,
        "-m",
        "launcher",
        "train",
        "experiment=smoke",
        f"run_dir={tmp_path / 'r'}",
    ]
    done = subprocess.run(
        command,
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert shutil.which("unshare")
    assert json.loads((tmp_path / "r" / "plan.json").read_text())["dp"] == 1
