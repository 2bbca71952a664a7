"""Where a run came from: versions, git commit, host, command line. Never the environment, never a secret."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.decode import encode
from launcher.environments.interpreter import Interpreter

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "colossalai",
    "megatron-core",
    "datasets",
    "tokenizers",
    "numpy",
    "hydra-core",
)


def collect(*, command: list[str], directory: Path, interpreter: Interpreter) -> dict[str, Any]:
    """Facts about this start; `directory` is where git is asked, `interpreter` the Python of the workers."""
    return {
        "command": command,
        "working_directory": str(directory),
        "hosts": [socket.gethostname()],
        "platform": platform.platform(),
        "versions": versions(),
        "interpreter": encode(interpreter),
        "git": git_state(directory),
    }


def versions() -> dict[str, str]:
    """Python, Meshwright and the packages that decide numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("meshwright", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout around `directory`; None outside one."""
    if shutil.which("git") is None:
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(directory, "status", "--porcelain"))}


def _git(directory: Path, *arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
